// From the record of a picture back to the form.
import { isFile } from "./form.js";

/**
 * The values of a record that differ from what the server takes by itself. A template is named if it still says what
 * the picture was made with; otherwise its parts are given, which is exact.
 */
export function valuesOf(record, form, templates) {
  const values = {};
  for (const [name, field] of form.fields) {
    const value = record.request[name];
    if (!isFile(field.property) && value !== null && value !== undefined && !same(value, field.fallback)) values[name] = value;
  }
  return withTemplate(values, record, templates);
}

const PARTS = ["system_prompt", "thinking_content", "assistant_content"];

function withTemplate(values, record, templates) {
  const name = typeof record.template === "string" ? record.template : record.template?.name;
  const template = templates.find((known) => known.name === name);
  const holds = template && PARTS.every((part) => (template[part] || "") === (record.request[part] || ""));
  if (!holds) return { ...values, template: undefined };
  const rest = Object.entries(values).filter(([part]) => !PARTS.includes(part) && part !== "force_think_block");
  return { ...Object.fromEntries(rest), template: name };
}

const same = (a, b) => String(a) === String(b ?? "") && typeof a !== "object";

/** Files that the picture was made from, which its record only names. */
export function filesOf(record, form) {
  return [...form.fields].filter(([name, field]) => isFile(field.property) && record.request[name]).map(([name]) => name);
}
