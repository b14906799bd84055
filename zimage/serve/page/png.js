// The settings that a PNG carries: its text chunk named "zimage".
import { parse } from "./http.js";

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const KEY = "zimage";

/** The record of a picture, or null where the file is not a PNG, carries no record, or is damaged. */
export async function settingsOf(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (!SIGNATURE.every((value, place) => bytes[place] === value)) return null;
  for (const [type, data] of chunks(bytes)) {
    const text = await textOf(type, data);
    if (text !== null) return record(text);
  }
  return null;
}

function* chunks(bytes) {
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    yield [latin(bytes.subarray(at + 4, at + 8)), bytes.subarray(at + 8, at + 8 + length)];
    at += length + 12;
  }
}

const latin = (bytes) => new TextDecoder("latin1").decode(bytes);

/** The text of a chunk of ours: tEXt in Latin-1, zTXt compressed, iTXt in UTF-8 with a language and a translated key. */
async function textOf(type, data) {
  const end = data.indexOf(0);
  if (!["tEXt", "zTXt", "iTXt"].includes(type) || latin(data.subarray(0, end)) !== KEY) return null;
  const rest = data.subarray(end + 1);
  if (type === "tEXt") return latin(rest);
  if (type === "zTXt") return latin(await inflated(rest.subarray(1)));
  const text = rest.subarray(rest.indexOf(0, rest.indexOf(0, 2) + 1) + 1);
  return new TextDecoder().decode(rest[0] ? await inflated(text) : text);
}

async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function record(text) {
  try {
    const found = parse(text);
    return found?.request ? found : null;
  } catch {
    return null;
  }
}
