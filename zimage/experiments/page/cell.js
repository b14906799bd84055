// One cell in full: its picture, all that is known of it, and the same request rendered once more.
import { $, closable, el, shape } from "./dom.js";
import { picture, record, renderAgain, rendering } from "./source.js";

const POLL = 400; // ms

export class CellView extends EventTarget {
  cell = null;

  constructor() {
    super();
    closable($("cell"));
    $("cell-previous").addEventListener("click", () => this.#step(-1));
    $("cell-next").addEventListener("click", () => this.#step(1));
    $("cell-compare").addEventListener("click", () => this.#compare());
    $("cell-render").addEventListener("click", () => this.#again());
    $("cell").addEventListener("keydown", ({ key, target }) => !target.closest("aside") && this.#step({ ArrowLeft: -1, ArrowRight: 1 }[key] ?? 0));
  }

  open(cell) {
    this.cell = cell;
    this.#show(cell);
    if (!$("cell").open) $("cell").showModal();
    $("cell-next").focus();
    record(cell.id).then((known) => this.cell === cell && this.#tell(known));
  }

  #show(cell) {
    const alt = cell.prompt || "Picture without a prompt";
    const shown = cell.fault ? el("p", {}, cell.fault) : el("img", { src: picture(cell.id), alt, class: cell.width < 512 ? "pixels" : null });
    $("cell-picture").replaceChildren(shown);
    shape($("cell-picture"), cell.width, cell.height);
    $("cell-label").textContent = cell.label;
    $("cell-prompt").textContent = cell.prompt;
    for (const name of ["cell-compare", "cell-render"]) $(name).disabled = Boolean(cell.fault);
    for (const name of ["cell-facts", "cell-request", "cell-load", "cell-again"]) $(name).replaceChildren();
    delete $("cell-again").dataset.equal;
  }

  #tell({ id, seed, request, load, timings, memory, counts, scores, machine, version }) {
    const numbers = (values, unit) => Object.entries(values ?? {}).map(([name, value]) => [name, unit(value)]);
    const facts = [["id", id], ["seed", seed], ...numbers(scores, short), ...numbers(timings, (s) => `${short(s)} s`)];
    facts.push(...numbers(memory, (bytes) => `${short(Number(bytes) / 1e9)} GB`), ...numbers(counts, String), ["version", version]);
    const shown = facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
    $("cell-facts").replaceChildren(...shown.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
    $("cell-request").textContent = indented(request);
    $("cell-load").textContent = indented({ ...load, ...machine });
  }

  #step(distance) {
    if (distance) this.dispatchEvent(new CustomEvent("step", { detail: distance }));
  }

  #compare() {
    $("cell").close();
    this.dispatchEvent(new CustomEvent("compare", { detail: this.cell }));
  }

  async #again() {
    const { cell } = this;
    try {
      this.#report(cell, await renderAgain(cell.id));
    } catch (error) {
      this.#report(cell, { state: "failed", told: error.message });
    }
  }

  #report(cell, { state, step, total, is_equal, told }) {
    if (this.cell !== cell || !$("cell").open) return;
    const words = { queued: "Waiting to be rendered again", running: total ? `Rendering: step ${step} of ${total}` : "Loading the model", done: `Rendered again: ${told}`, failed: `Not rendered again: ${told}` };
    $("cell-again").textContent = words[state];
    if (state === "done") $("cell-again").dataset.equal = is_equal;
    else delete $("cell-again").dataset.equal;
    if (state === "queued" || state === "running") setTimeout(async () => this.#report(cell, await rendering(cell.id)), POLL);
  }
}

const short = (value) => String(Number(Number(value).toPrecision(4)));

const indented = (value) => JSON.stringify(value, (key, item) => (typeof item === "bigint" ? String(item) : item), 2);
