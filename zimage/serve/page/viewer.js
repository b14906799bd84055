// A picture in full, and two pictures under a slider.
import { $, closable, el, shape } from "./dom.js";
import { Slider } from "./slider.js";
import { factsOf } from "./stage.js";

export class Viewer {
  constructor(history) {
    this.history = history;
    this.slider = new Slider();
    closable($("viewer"));
    $("viewer-previous").addEventListener("click", () => this.step(-1));
    $("viewer-next").addEventListener("click", () => this.step(1));
    $("viewer-scale").addEventListener("click", () => this.#scale(!this.isActualSize));
    $("viewer").addEventListener("keydown", (event) => this.#key(event));
  }

  get isActualSize() {
    return $("viewer-scale").getAttribute("aria-pressed") === "true";
  }

  open(image) {
    this.#fill(image);
    if (!$("viewer").open) $("viewer").showModal();
    $("viewer-next").focus();
  }

  step(distance) {
    const image = this.history.step(distance);
    if (image) this.#fill(image);
  }

  #fill(image) {
    const img = el("img", { src: image.url, alt: image.prompt || "Picture without a prompt", onclick: () => this.#scale(!this.isActualSize) });
    shape(img, image.width, image.height);
    $("viewer-picture").replaceChildren(img);
    $("viewer-caption").textContent = [image.prompt, factsOf(image)[0], factsOf(image)[1]].filter(Boolean).join(" · ");
    this.#scale(false);
  }

  #scale(isActual) {
    $("viewer-scale").setAttribute("aria-pressed", String(isActual));
    $("viewer-picture").classList.toggle("actual", isActual);
  }

  #key(event) {
    const distance = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const scrolls = this.isActualSize && event.target === $("viewer-picture");
    if (!distance || scrolls) return;
    event.preventDefault();
    this.step(distance);
  }

  compare(left, right) {
    const labelled = (image) => ({ ...image, label: `${image.prompt} · seed ${image.seed}` });
    this.slider.open(labelled(left), labelled(right));
  }
}
