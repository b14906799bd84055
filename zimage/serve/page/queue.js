// The jobs that run and wait: progress, order, cancel.
import { $, el, tool } from "./dom.js";
import { described, fraction } from "./jobs.js";

export class Queue extends EventTarget {
  #rows = new Map();

  constructor(jobs) {
    super();
    this.jobs = jobs;
    for (const name of ["change", "end"]) jobs.addEventListener(name, () => this.#draw());
  }

  #draw() {
    const active = this.jobs.active;
    $("queue").hidden = active.length === 0;
    for (const id of this.#rows.keys()) if (!active.some((job) => job.id === id)) this.#rows.delete(id);
    const rows = active.map((job, place) => this.#row(job, place, active.length));
    const shown = $("queue-rows").children;
    if (rows.length !== shown.length || rows.some((row, place) => row !== shown[place])) this.#arrange(rows);
  }

  /** Put the rows in order; whoever had the focus keeps it. */
  #arrange(rows) {
    const focused = document.activeElement;
    $("queue-rows").replaceChildren(...rows);
    if (rows.some((row) => row.contains(focused))) focused.focus();
  }

  #row(job, place, count) {
    if (!this.#rows.has(job.id)) this.#rows.set(job.id, this.#make(job));
    const row = this.#rows.get(job.id);
    row.querySelector(".queue-state").textContent = described(job);
    row.querySelector("progress").value = fraction(job);
    row.classList.toggle("running", job.state === "running");
    row.querySelector(".up").disabled = job.state === "running" || !job.position;
    row.querySelector(".down").disabled = job.state === "running" || place === count - 1;
    return row;
  }

  #make(job) {
    const prompt = [job.request.prompt].flat().join(" / ") || "No prompt";
    const act = (name, detail) => () => this.dispatchEvent(new CustomEvent(name, { detail: detail ?? job.id }));
    const by = (distance) => () => this.dispatchEvent(new CustomEvent("move", { detail: { id: job.id, distance } }));
    const show = el("button", { type: "button", class: "queue-prompt", title: prompt, onclick: act("show") }, prompt);
    const state = el("span", { class: "queue-state quiet" });
    const buttons = [tool("up", `Earlier: ${prompt}`, by(-1), { class: "tool up" }), tool("down", `Later: ${prompt}`, by(1), { class: "tool down" }), tool("close", `Cancel: ${prompt}`, act("cancel"))];
    const bar = el("progress", { max: 1, value: 0, "aria-label": `Progress: ${prompt}` });
    return el("li", { class: "queue-row" }, el("div", { class: "queue-text" }, show, state), el("div", { class: "queue-tools" }, ...buttons), bar);
  }
}
