// A list of templates of which one is chosen: radio buttons, so that arrow keys and screen readers know it.
import { el } from "./dom.js";

/** Fill `node` with the templates, under a heading per category; `choose(template)` is called at every choice. */
export function listChoices(node, name, templates, chosen, choose) {
  const rows = [];
  const areSeveral = new Set(templates.map((template) => template.category)).size > 1;
  let category = areSeveral ? null : templates[0]?.category;
  for (const template of templates) {
    if (template.category !== category) rows.push(el("p", { class: "choices-head" }, template.category));
    category = template.category;
    rows.push(row(name, template, template.name === chosen, choose));
  }
  node.replaceChildren(...rows);
}

function row(name, template, isChosen, choose) {
  const input = el("input", { type: "radio", name, value: template.name, checked: isChosen, onchange: () => choose(template) });
  return el("label", { class: "choice" }, input, el("span", {}, el("strong", {}, template.name), el("span", { class: "quiet" }, template.description)));
}

/** Those that hold every word, wherever it stands. */
export function matching(templates, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  return templates.filter((template) => {
    const text = Object.values(template).join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
}

/** What a template adds to a prompt, part by part. */
export function partsOf(template) {
  const thinks = template.thinking_content || (template.add_think_block ? "(empty)" : "");
  const parts = [["System message", template.system_prompt], ["Think block", thinks], ["Assistant message", template.assistant_content]];
  return parts.filter(([, text]) => text);
}
