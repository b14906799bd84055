// Small helpers around the document. Text always goes in as text, so nothing that a server sends can become markup.

export const $ = (id) => document.getElementById(id);

/** An element: el("button", {class: "chip", onclick: f, "aria-label": "Close"}, "text", child). */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== undefined && child !== null));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** A drawing of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button that shows a drawing only; its label is for screen readers and the tooltip. */
export function tool(name, label, onclick, more = {}) {
  return el("button", { type: "button", class: "tool", "aria-label": label, title: label, onclick, ...more }, icon(name));
}

/** Call `action` once nothing has asked for it for `delay` ms. */
export function debounced(action, delay) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), delay);
  };
}

/** Make buttons with data-close, and a click beside it, close a dialog. */
export function closable(dialog) {
  for (const button of dialog.querySelectorAll("[data-close]")) button.addEventListener("click", () => dialog.close());
  dialog.addEventListener("mousedown", (event) => {
    if (event.target === dialog) dialog.close();
  });
  return dialog;
}

export const dialogIsOpen = () => document.querySelector("dialog[open]") !== null;

/** Whether keys that are typed now are somebody's text, or move a slider or a choice. */
export const isTyping = (target) => target.closest?.("input, textarea, select, [contenteditable]") !== null;

/** Fill a frame with a picture's own shape: CSS computes its size from the two sides. */
export function shape(node, width, height) {
  node.style.setProperty("--w", width || 1);
  node.style.setProperty("--h", height || 1);
}
