// Adapters of the configured folder, each with its weight.
import { $, el, tool } from "./dom.js";

export class Loras {
  constructor(form) {
    this.form = form;
    this.names = form.schema.lora.names;
    $("loras").hidden = this.names.length === 0;
    $("add-lora").addEventListener("click", () => this.#add(this.names[0], 1, true));
    form.addEventListener("reset", () => $("lora-rows").replaceChildren());
  }

  /** NAME:WEIGHT of each row. */
  get values() {
    return [...$("lora-rows").children].map((row) => `${row.querySelector("select").value}:${row.querySelector(".weight").value || 1}`);
  }

  /** Take a list of NAME:WEIGHT, or the entries of a picture's record; returns the names that are not here. */
  fill(loras) {
    const entries = loras.map((lora) => (typeof lora === "string" ? split(lora) : [lora.name, lora.scale]));
    $("lora-rows").replaceChildren();
    for (const [name, weight] of entries) if (this.#known(name)) this.#add(this.#known(name), weight, false);
    return entries.map(([name]) => name).filter((name) => !this.#known(name));
  }

  /** A record may name the file with its ending, the list may not. */
  #known(name) {
    return this.names.find((known) => stem(known) === stem(name));
  }

  #add(name, weight, byHand) {
    const choice = el("select", { "aria-label": "LoRA" }, ...this.names.map((known) => el("option", { value: known, selected: known === name }, known)));
    const number = el("input", { type: "number", class: "weight", step: 0.05, value: weight, "aria-label": "Weight of the LoRA" });
    const range = el("input", { type: "range", min: -1, max: 2, step: 0.05, value: weight, "aria-label": "Weight of the LoRA, slider" });
    range.addEventListener("input", () => (number.value = range.value));
    number.addEventListener("input", () => (range.value = number.value));
    const row = el("li", { class: "lora-row" }, choice, tool("close", "Remove the LoRA", () => this.#remove(row)), range, number);
    $("lora-rows").append(row);
    if (byHand) choice.focus();
    this.form.refresh();
  }

  #remove(row) {
    row.remove();
    $("add-lora").focus();
    this.form.refresh();
  }
}

const stem = (name) => name.replace(/\.safetensors$/, "");

function split(text) {
  const colon = text.lastIndexOf(":");
  return colon > 0 ? [text.slice(0, colon), Number(text.slice(colon + 1))] : [text, 1];
}
