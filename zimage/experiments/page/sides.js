// What stands along the sides, and which values are shown. The address keeps both, so that a view can be sent on.
import { $, debounced, el } from "./dom.js";

const MOST_CHIPS = 12; // values of an axis that are chips; more become a list

export class Sides extends EventTarget {
  only = new Map(); // axis → set of values; all where there is none

  constructor() {
    super();
    const given = new URLSearchParams(location.search);
    this.columns = given.getAll("columns");
    this.rows = given.getAll("rows");
    for (const text of given.getAll("only")) this.#toggle(...split(text));
    for (const name of ["columns", "rows"]) $(name).addEventListener("change", () => this.#turn(name));
  }

  get asked() {
    const only = [...this.only].flatMap(([axis, values]) => [...values].map((value) => `${axis}=${value}`));
    return { columns: this.columns, rows: this.rows, only };
  }

  /** Show what the grid says. */
  fill({ axes, sides }) {
    for (const name of ["columns", "rows"]) this.#options($(name), Object.keys(axes), sides[name]);
    $("filters").replaceChildren(...Object.entries(axes).map(([axis, values]) => this.#filter(axis, values)));
  }

  /** An axis that is taken from the other side leaves that side to the viewer. */
  #turn(name) {
    const other = name === "columns" ? "rows" : "columns";
    this[name] = $(name).value ? [$(name).value] : [];
    if (this[other].some((axis) => this[name].includes(axis))) this[other] = [];
    this.#changed();
  }

  #options(select, names, chosen) {
    const joined = chosen.length > 1 || chosen.length === 0;
    const first = joined ? [el("option", { value: "", selected: true }, chosen.join(" + ") || "none")] : [];
    select.replaceChildren(...first, ...names.map((name) => el("option", { value: name, selected: !joined && name === chosen[0] }, name)));
  }

  #filter(axis, values) {
    const on = this.only.get(axis) ?? new Set();
    const flip = (value) => {
      this.#toggle(axis, value);
      this.#changed();
    };
    const chips = values.map((value) => el("button", { type: "button", class: "chip", "aria-pressed": String(on.has(value)), title: value, onclick: () => flip(value) }, el("span", {}, value)));
    return el("div", { class: "filter", role: "group", "aria-label": `Only ${axis}` }, el("span", {}, axis), ...(values.length > MOST_CHIPS ? [this.#list(axis, values, on)] : chips));
  }

  #list(axis, values, on) {
    const all = el("option", { value: "" }, `all ${values.length}`);
    const options = values.map((value) => el("option", { value, selected: on.has(value) }, value));
    const choose = (event) => {
      this.only.delete(axis);
      if (event.target.value) this.#toggle(axis, event.target.value);
      this.#changed();
    };
    return el("select", { "aria-label": `Only ${axis}`, onchange: choose }, all, ...options);
  }

  #toggle(axis, value) {
    const values = this.only.get(axis) ?? new Set();
    if (!values.delete(value)) values.add(value);
    if (values.size) this.only.set(axis, values);
    else this.only.delete(axis);
  }

  #changed = debounced(() => {
    const query = new URLSearchParams();
    for (const [name, values] of Object.entries(this.asked)) for (const value of values) query.append(name, value);
    history.replaceState(null, "", query.size ? `?${query}` : location.pathname);
    this.dispatchEvent(new Event("change"));
  }, 50);
}

const split = (text) => [text.slice(0, text.indexOf("=")), text.slice(text.indexOf("=") + 1)];
