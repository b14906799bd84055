// Two pictures, one over the other; a slider says how much of the left one is seen.
import { $, closable, el, shape } from "./dom.js";

export class Slider {
  constructor() {
    closable($("compare"));
    $("compare-slider").addEventListener("input", () => this.#cut());
  }

  /** Pictures are {url, width, height, label}. */
  open(left, right) {
    const over = el("img", { class: "over", src: left.url, alt: `Left: ${left.label}` });
    const under = el("img", { src: right.url, alt: `Right: ${right.label}` });
    $("compare-picture").replaceChildren(under, over, el("div", { class: "cut" }));
    shape($("compare-picture"), Math.max(left.width, right.width), Math.max(left.height, right.height));
    $("compare-left").textContent = left.label;
    $("compare-right").textContent = right.label;
    $("compare-slider").value = 50;
    this.#cut();
    $("compare").showModal();
    $("compare-slider").focus();
  }

  #cut() {
    $("compare-picture").style.setProperty("--cut", `${$("compare-slider").value}%`);
  }
}
