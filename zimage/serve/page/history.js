// The pictures so far: a grid that loads as it is scrolled, search, and which of them is chosen.
import * as api from "./api.js";
import { $, debounced, el } from "./dom.js";

const PAGE = 60;

export class History extends EventTarget {
  images = []; // those loaded, newest first
  chosen = null; // id
  #next = null; // cursor of the next page; null where there is none
  #asked = 0; // a slower answer to an older question is dropped
  #loading = false;
  #total = 0;
  #end = new IntersectionObserver((entries) => entries.at(-1).isIntersecting && this.#more(), { rootMargin: "600px" });

  constructor() {
    super();
    $("search").addEventListener("input", debounced(() => this.load(), 200));
    $("grid").addEventListener("click", (event) => this.#clicked(event));
  }

  get query() {
    return $("search").value.trim();
  }

  /** The first page anew. */
  async load() {
    const asked = ++this.#asked;
    const page = await api.history(this.query, "", PAGE);
    if (asked !== this.#asked) return;
    this.images = [];
    $("grid").replaceChildren();
    this.#append(page);
    this.#observeEnd();
    this.dispatchEvent(new Event("loaded"));
  }

  async #more() {
    if (!this.#next || this.#loading) return;
    this.#loading = true;
    const asked = this.#asked;
    try {
      const page = await api.history(this.query, this.#next, PAGE);
      if (asked === this.#asked) this.#append(page);
    } finally {
      this.#loading = false;
    }
    this.#observeEnd();
  }

  /** An observer tells of changes only, once a frame: it begins anew, so that it tells whether the next page is due. */
  #observeEnd() {
    this.#end.unobserve($("grid-end"));
    this.#end.observe($("grid-end"));
  }

  #append({ images, next, total }) {
    this.#next = next;
    const known = new Set(this.images.map(({ id }) => id));
    const fresh = images.filter(({ id }) => !known.has(id));
    this.images.push(...fresh);
    $("grid").append(...fresh.map((image) => this.#tile(image)));
    this.#count(total);
  }

  #tile(image) {
    const words = `${image.prompt || "No prompt"}, seed ${image.seed}`;
    const img = el("img", { src: image.thumbnail, alt: "", loading: "lazy", decoding: "async", width: 160, height: 160 });
    const button = el("button", { type: "button", class: "tile", "data-id": image.id, "aria-label": words, title: image.prompt, tabindex: -1, "aria-current": image.id === this.chosen ? "true" : null }, img);
    return el("li", {}, button);
  }

  #count(total) {
    this.#total = total;
    $("history-total").textContent = total ? total.toLocaleString() : "";
    $("clear-history").hidden = !total || Boolean(this.query);
    $("history-none").hidden = total > 0;
    $("history-none").textContent = this.query ? `Nothing found for “${this.query}”.` : "Finished pictures are kept here.";
    this.#mark();
  }

  #clicked(event) {
    const tile = event.target.closest(".tile");
    if (tile) this.#tell(this.images.find(({ id }) => id === tile.dataset.id));
  }

  #tell(image) {
    this.dispatchEvent(new CustomEvent("chosen", { detail: image }));
  }

  /** Mark a picture as the one that is shown. */
  choose(id) {
    this.chosen = id;
    this.#mark();
  }

  /** One tile takes part in the tab order: the chosen one, else the first. */
  #mark() {
    const tiles = [...$("grid").querySelectorAll(".tile")];
    const current = tiles.find((tile) => tile.dataset.id === this.chosen) ?? tiles[0];
    for (const tile of tiles) {
      tile.tabIndex = tile === current ? 0 : -1;
      if (tile.dataset.id === this.chosen) tile.setAttribute("aria-current", "true");
      else tile.removeAttribute("aria-current");
    }
  }

  /** Choose the newer (−1) or older (+1) neighbour; returns it, or null at an end. */
  step(distance) {
    const place = this.images.findIndex(({ id }) => id === this.chosen);
    const image = this.images[place < 0 ? 0 : place + distance];
    if (!image) return null;
    if (place + distance >= this.images.length - 4) this.#more();
    const hadFocus = document.activeElement?.classList.contains("tile");
    this.#tell(image);
    const tile = this.#tileOf(image.id);
    tile?.scrollIntoView({ block: "nearest" });
    if (hadFocus) tile?.focus();
    return image;
  }

  #tileOf(id) {
    return $("grid").querySelector(`[data-id="${CSS.escape(id)}"]`);
  }

  /** A new picture goes to the front, unless a search would not show it. */
  add(image) {
    if (this.images.some(({ id }) => id === image.id)) return;
    if (this.query) return void this.load();
    this.images.unshift(image);
    $("grid").prepend(this.#tile(image));
    this.#count(this.#total + 1);
  }

  /** Take pictures out of the grid; returns the neighbour of the chosen one, if that was among them. */
  drop(ids) {
    const place = this.images.findIndex(({ id }) => id === this.chosen);
    const chosenGoes = ids.includes(this.chosen);
    const before = this.images.length;
    const rest = (from) => this.images.slice(from).find(({ id }) => !ids.includes(id));
    const neighbour = chosenGoes ? (rest(place) ?? this.images.filter(({ id }) => !ids.includes(id)).at(-1) ?? null) : undefined;
    this.images = this.images.filter(({ id }) => !ids.includes(id));
    for (const id of ids) this.#tileOf(id)?.parentElement.remove();
    this.#count(Math.max(0, this.#total - (before - this.images.length)));
    this.#observeEnd();
    return neighbour;
  }
}
