// Questions to a server and their answers: errors with the fields at fault, whole numbers of any size, the session.

/** An answer other than success. `fields` names what is at fault; status 0 means that nothing answered. */
export class ApiError extends Error {
  constructor(status, message, fields = []) {
    super(message);
    this.status = status;
    this.fields = fields;
  }
}

/** JSON in which whole numbers that a double cannot hold stay exact, as BigInt. */
export function parse(text) {
  return JSON.parse(text, (key, value, context) => {
    const exact = typeof value !== "number" || Number.isSafeInteger(value) || !Number.isInteger(value);
    return exact || !/^-?\d+$/.test(context?.source ?? "") ? value : BigInt(context.source);
  });
}

export function encode(value) {
  return JSON.stringify(value, (key, item) => (typeof item === "bigint" ? JSON.rawJSON(String(item)) : item));
}

let signIn = null;

/** Say who asks for the token: an async function that is called on 401 and returns when there is a session. */
export function onUnauthorised(ask) {
  signIn = ask;
}

async function send(method, path, { body, headers = {}, signal } = {}) {
  const isJson = body !== undefined && !(body instanceof FormData);
  const init = { method, signal, headers: isJson ? { "Content-Type": "application/json", ...headers } : headers };
  if (body !== undefined) init.body = isJson ? encode(body) : body;
  try {
    return await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached. Is it still running?");
  }
}

async function failure(response) {
  const answer = await response.json().catch(() => ({}));
  const { message, fields } = answer.error ?? {};
  return new ApiError(response.status, message ?? `The server answered ${response.status}.`, fields ?? []);
}

export async function answered(method, path, options) {
  let response = await send(method, path, options);
  while (response.status === 401 && signIn) {
    await signIn();
    response = await send(method, path, options);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export const ask = async (method, path, options) => parse(await (await answered(method, path, options)).text());

/** Whether the token is right; then the browser holds a cookie that says so. */
export async function openSession(token) {
  const response = await send("POST", "/api/session", { body: { token } });
  if (!response.ok) throw await failure(response);
}
