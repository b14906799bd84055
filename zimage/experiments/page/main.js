// The page put together.
import { CellView } from "./cell.js";
import { $, dialogIsOpen } from "./dom.js";
import { onUnauthorised } from "./http.js";
import { PairView } from "./pair.js";
import { drawSheet, inOrder } from "./sheet.js";
import { Sides } from "./sides.js";
import { signIn } from "./signin.js";
import { grid, isServed } from "./source.js";
import { toast } from "./toast.js";
import { Votes } from "./vote.js";

class Page {
  known = null; // the grid as it was last answered
  first = null; // the cell that another one is compared with

  constructor() {
    this.sides = new Sides();
    this.view = new CellView();
    this.pair = new PairView();
    this.votes = new Votes();
    this.sides.addEventListener("change", () => this.load());
    this.view.addEventListener("step", ({ detail }) => this.#step(detail));
    this.view.addEventListener("compare", ({ detail }) => this.#pick(detail));
    $("pick-stop").addEventListener("click", () => this.#pick(null));
    $("size").addEventListener("input", () => this.#size());
    document.addEventListener("keydown", ({ key }) => key === "Escape" && !dialogIsOpen() && this.#pick(null));
    for (const node of document.querySelectorAll(".served")) node.hidden = !isServed;
    this.#size();
  }

  async load() {
    try {
      this.#show(await grid(this.sides.asked));
      $("fault").textContent = "";
    } catch (error) {
      $("fault").textContent = error.message;
    }
    document.documentElement.dataset.ready = "";
  }

  #show(known) {
    this.known = known;
    const count = Object.keys(known.cells).length;
    document.title = known.name;
    $("name").textContent = known.name;
    $("count").textContent = count === known.total ? `${count} cells` : `${count} of ${known.total} cells`;
    $("note").textContent = known.note ?? "";
    $("note").hidden = !known.note;
    this.sides.fill(known);
    this.votes.fill(known);
    drawSheet(known, (id) => this.#chosen(id));
  }

  #chosen(id) {
    const { first } = this;
    const cell = this.known.cells[id];
    if (!first) return this.view.open(cell);
    if (cell.fault || id === first.id) return;
    this.#pick(null);
    this.pair.open(first, cell);
  }

  #step(distance) {
    const ids = inOrder(this.known);
    const next = ids[ids.indexOf(this.view.cell.id) + distance];
    if (next) this.view.open(this.known.cells[next]);
  }

  /** Wait for a second cell; null stops waiting. */
  #pick(cell) {
    this.first = cell;
    $("pick").hidden = !cell;
    $("pages").classList.toggle("picking", Boolean(cell));
    for (const node of $("pages").querySelectorAll("[aria-pressed]")) node.removeAttribute("aria-pressed");
    if (cell) $("pages").querySelector(`[data-id="${cell.id}"]`)?.setAttribute("aria-pressed", "true");
  }

  #size() {
    const { value, min, max } = $("size");
    $("pages").style.setProperty("--cell", `${value}px`);
    $("size").style.setProperty("--filled", `${((value - min) / (max - min)) * 100}%`);
  }
}

onUnauthorised(signIn);
window.addEventListener("unhandledrejection", ({ reason }) => toast(reason.message, { isFault: true }));
new Page().load();
