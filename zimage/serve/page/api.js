// The server as the page sees it: one function per question.
import { answered, ask, encode, parse } from "./http.js";

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
