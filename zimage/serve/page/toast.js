// Short messages that leave by themselves, some with a way back.
import { $, el, tool } from "./dom.js";

const SHOWN = 8000; // ms; while the pointer or the focus is on it, a message stays

export function toast(text, { undo, action = "Undo", isFault = false } = {}) {
  const close = () => node.remove();
  const back = undo && el("button", { type: "button", class: "link", onclick: () => { close(); undo(); } }, action);
  const node = el("div", { class: isFault ? "toast bad" : "toast" }, el("span", {}, text), back, tool("close", "Close the message", close));
  $("toasts").append(node);
  leaveLater(node, close);
  return node;
}

function leaveLater(node, close) {
  const check = () => (node.matches(":hover, :focus-within") ? setTimeout(check, 1000) : close());
  setTimeout(check, SHOWN);
}
