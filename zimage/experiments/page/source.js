// Where the page has everything from: the viewer that serves it, or the file that it stands in.
import { ask, answered, parse } from "./http.js";

const held = document.getElementById("held"); // JSON: {grid, records, pictures, ranks} of a file that holds all of it
const file = held && parse(held.textContent);

export const isServed = !file;

/** Whose names and values are texts; `sides` names axes and `only` lists AXIS=VALUE. */
export function grid({ columns, rows, only }) {
  if (file) return Promise.resolve(file.grid);
  const query = new URLSearchParams();
  for (const [name, values] of Object.entries({ columns, rows, only })) for (const value of values) query.append(name, value);
  return ask("GET", `/api/grid?${query}`);
}

export const thumbnail = (id) => (file ? file.pictures[id] : `/api/cells/${id}/thumbnail`);
export const picture = (id) => (file ? file.pictures[id] : `/api/cells/${id}/picture`);
export const record = (id) => (file ? Promise.resolve(file.records[id]) : ask("GET", `/api/cells/${id}`));

/** A difference: the address of its picture, to be revoked, and its figures in words. */
export async function difference(left, right, kind, gain) {
  const response = await answered("GET", `/api/difference?${new URLSearchParams({ left, right, kind, gain })}`);
  return { url: URL.createObjectURL(await response.blob()), words: response.headers.get("X-Distance") };
}

export const drawPair = (axis) => ask("POST", "/api/pairs", { body: { axis } });
export const sideOf = (token, side) => `/api/pairs/${token}/${side}`;
export const vote = (token, choice) => ask("POST", `/api/pairs/${token}`, { body: { choice } });
export const ranks = () => (file ? Promise.resolve(file.ranks) : ask("GET", "/api/ranks"));
export const votes = () => ask("GET", "/api/votes");
export const renderAgain = (id) => ask("POST", `/api/cells/${id}/render`);
export const rendering = (id) => ask("GET", `/api/cells/${id}/render`);
