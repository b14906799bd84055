// Two cells: under the slider, or as a difference that the viewer draws. Space flips between the two.
import { $, el } from "./dom.js";
import { Slider } from "./slider.js";
import { difference, picture } from "./source.js";

export class PairView {
  #address = null;

  constructor() {
    this.slider = new Slider();
    $("compare-kinds").addEventListener("input", () => this.#draw());
    $("compare-kinds").addEventListener("submit", (event) => event.preventDefault());
    $("compare").addEventListener("close", () => this.#release());
    $("compare").addEventListener("keydown", (event) => event.key === " " && event.target.id === "compare-slider" && this.#flip(event));
  }

  open(left, right) {
    this.left = left;
    this.right = right;
    $("compare-kinds").reset();
    this.#draw();
  }

  #draw() {
    const { kind, gain } = Object.fromEntries(new FormData($("compare-kinds")));
    $("compare-kinds").gain.style.setProperty("--filled", `${((gain - 1) / 31) * 100}%`);
    $("compare").classList.toggle("flat", Boolean(kind));
    $("compare-distance").textContent = "";
    if (kind) return this.#difference(kind, gain);
    if ($("compare").open) $("compare").close();
    const shown = (cell) => ({ url: picture(cell.id), width: cell.width, height: cell.height, label: cell.label });
    this.slider.open(shown(this.left), shown(this.right));
  }

  async #difference(kind, gain) {
    const asked = (this.asked = {});
    const { url, words } = await difference(this.left.id, this.right.id, kind, gain).catch((error) => ({ words: error.message }));
    if (asked !== this.asked || !$("compare").open) return url && URL.revokeObjectURL(url);
    this.#release();
    this.#address = url;
    $("compare-distance").textContent = words;
    if (url) $("compare-picture").replaceChildren(el("img", { src: url, class: "pixels", alt: `${kind} difference` }));
  }

  #flip(event) {
    event.preventDefault();
    $("compare-slider").value = Number($("compare-slider").value) > 50 ? 0 : 100;
    $("compare-slider").dispatchEvent(new Event("input"));
  }

  #release() {
    if (this.#address) URL.revokeObjectURL(this.#address);
    this.#address = null;
  }
}
