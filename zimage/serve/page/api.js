// The server as the page sees it: one function per question, errors with the fields at fault, seeds of 63 bits.

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

async function answered(method, path, options) {
  let response = await send(method, path, options);
  while (response.status === 401 && signIn) {
    await signIn();
    response = await send(method, path, options);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

const ask = async (method, path, options) => parse(await (await answered(method, path, options)).text());

const query = (values) => new URLSearchParams(Object.entries(values).filter(([, value]) => value)).toString();

// crypto.randomUUID exists on secure origins only, and a server in a home network is not one.
const newKey = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(16)).join("-");

/** The request alone as JSON; with files as multipart, where JSON is one part and each file another. */
function bodyOf(request, files) {
  if (Object.keys(files).length === 0) return request;
  const form = new FormData();
  form.append("request", new Blob([encode(request)], { type: "application/json" }), "request.json");
  for (const [name, some] of Object.entries(files)) for (const file of [some].flat()) form.append(name, file, file.name ?? `${name}.png`);
  return form;
}

/** Ask for a render. A second try carries the same key, so that it cannot become a second job. */
export async function submit(request, files) {
  const options = { body: bodyOf(request, files), headers: { "Idempotency-Key": newKey() } };
  try {
    return await ask("POST", "/api/jobs", options);
  } catch (error) {
    if (error.status !== 0) throw error;
    return ask("POST", "/api/jobs", options);
  }
}

/** What is seen in a picture, as a file of embeddings. */
export async function extract(values, picture) {
  return (await answered("POST", "/api/vl/extract", { body: bodyOf(values, { picture }) })).blob();
}

export const schema = () => ask("GET", "/api/schema");
export const jobs = () => ask("GET", "/api/jobs?state=queued,running&limit=1000");
export const job = (id) => ask("GET", `/api/jobs/${id}`);
export const move = (id, position) => ask("PATCH", `/api/jobs/${id}`, { body: { position } });
export const cancel = (id) => ask("DELETE", `/api/jobs/${id}`);
export const history = (q, before, limit) => ask("GET", `/api/history?${query({ q, before, limit })}`);
export const remove = (id) => ask("DELETE", `/api/history/${id}`);
export const removeAll = () => ask("DELETE", "/api/history");
export const restore = (ids) => ask("POST", "/api/history/restore", { body: { ids } });
export const format = (request, signal) => ask("POST", "/api/format-prompt", { body: request, signal });
export const templates = () => ask("GET", "/api/templates");
export const rewriters = () => ask("GET", "/api/rewriters");
export const rewriterConfig = () => ask("GET", "/api/rewriter-config");
export const rewrite = (request, signal) => ask("POST", "/api/rewrite", { body: request, signal });

/** Whether the token is right; then the browser holds a cookie that says so. */
export async function openSession(token) {
  const response = await send("POST", "/api/session", { body: { token } });
  if (!response.ok) throw await failure(response);
}

const EVENTS = ["job", "position", "progress", "preview", "image", "end", "history"];

/** Live events of all jobs: `tell(event, data)`. The browser resumes by itself; after a refusal we start again. */
export function listen(tell, connected) {
  const source = new EventSource("/api/events");
  for (const name of EVENTS) source.addEventListener(name, (event) => tell(name, parse(event.data)));
  source.onopen = () => connected(true);
  source.onerror = () => {
    connected(false);
    if (source.readyState === EventSource.CLOSED) setTimeout(() => restart(tell, connected), 2000);
  };
}

async function restart(tell, connected) {
  await ask("GET", "/api/jobs?limit=1").catch(() => null); // asks for the token if that is what is missing
  listen(tell, connected);
}
