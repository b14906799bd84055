// A picture in full, and two pictures under a slider.
import { $, closable, el } from "./dom.js";
import { factsOf, shape } from "./stage.js";

export class Viewer {
  constructor(history) {
    this.history = history;
    closable($("viewer"));
    closable($("compare"));
    $("viewer-previous").addEventListener("click", () => this.step(-1));
    $("viewer-next").addEventListener("click", () => this.step(1));
    $("viewer-scale").addEventListener("click", () => this.#scale(!this.isActualSize));
    $("viewer").addEventListener("keydown", (event) => this.#key(event));
    $("compare-slider").addEventListener("input", () => this.#cut());
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

  /** Lay one picture over the other; the slider says how much of the left one is seen. */
  compare(left, right) {
    const over = el("img", { class: "over", src: left.url, alt: `Left: ${left.prompt}` });
    const under = el("img", { src: right.url, alt: `Right: ${right.prompt}` });
    $("compare-picture").replaceChildren(under, over, el("div", { class: "cut" }));
    shape($("compare-picture"), Math.max(left.width, right.width), Math.max(left.height, right.height));
    $("compare-left").textContent = `${left.prompt} · seed ${left.seed}`;
    $("compare-right").textContent = `${right.prompt} · seed ${right.seed}`;
    $("compare-slider").value = 50;
    this.#cut();
    $("compare").showModal();
    $("compare-slider").focus();
  }

  #cut() {
    $("compare-picture").style.setProperty("--cut", `${$("compare-slider").value}%`);
  }
}
