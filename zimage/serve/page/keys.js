// Keys of the whole page. Single letters count only where nobody types and no dialogue is open.
import { $, closable, dialogIsOpen, isTyping } from "./dom.js";

/** `actions`: render, cancel, step(distance), view, remove. */
export function listenToKeys(actions) {
  closable($("keys"));
  $("open-keys").addEventListener("click", () => $("keys").showModal());
  document.addEventListener("keydown", (event) => {
    if (dialogIsOpen()) return;
    const action = ofEverywhere(event, actions) ?? (isTyping(event.target) ? null : ofPage(event, actions));
    if (!action) return;
    event.preventDefault();
    action();
  });
}

function ofEverywhere(event, { render, cancel }) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) return render;
  return event.key === "Escape" && event.target.id !== "search" ? cancel : null; // there it empties the search
}

function ofPage(event, { step, view, remove }) {
  if (event.ctrlKey || event.metaKey || event.altKey) return null;
  const keys = {
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    f: view,
    Delete: remove,
    "/": () => $("search").focus(),
    "?": () => $("keys").showModal(),
  };
  return keys[event.key];
}
