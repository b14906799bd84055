// Presets beside width and height: the two fields hold the truth, the choice shows it.
import { $, el } from "./dom.js";

export class Size {
  constructor(form) {
    this.width = form.field("width");
    this.height = form.field("height");
    this.#fill(form.schema.presets);
    $("preset").addEventListener("input", () => this.#take($("preset").value));
    $("swap").addEventListener("click", () => this.#swap());
    form.addEventListener("change", () => this.#rest());
    this.#rest();
  }

  #fill(presets) {
    const kinds = [["Square", (w, h) => w === h], ["Landscape", (w, h) => w > h], ["Portrait", (w, h) => w < h]];
    const option = ([w, h]) => el("option", { value: `${w}x${h}` }, `${w} × ${h}`);
    const groups = kinds.map(([label, fits]) => el("optgroup", { label }, ...presets.filter(([w, h]) => fits(w, h)).map(option)));
    $("preset").replaceChildren(el("option", { value: "" }, "Default"), ...groups, el("option", { value: "custom" }, "Custom"));
  }

  #take(text) {
    if (text === "custom") return this.width.input.focus();
    const [width, height] = text ? text.split("x").map(Number) : [];
    this.#set(width, height);
  }

  #set(width, height) {
    this.width.value = width;
    this.height.value = height;
    this.width.changed();
    this.height.changed();
  }

  #swap() {
    if (this.width.value === undefined && this.height.value === undefined) return;
    this.#set(this.height.effective, this.width.effective);
  }

  #rest() {
    const { width: { value: w }, height: { value: h } } = this;
    const wanted = w === undefined && h === undefined ? "" : `${w}x${h}`;
    const known = [...$("preset").options].some(({ value }) => value === wanted);
    $("preset").value = known ? wanted : "custom";
  }
}
