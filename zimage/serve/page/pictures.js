// A field of several pictures, each with values of its own: references with an alpha, controls with a file and a scale.
// What a row has besides its picture is declared by the schema of the field's items.
import { el, tool } from "./dom.js";
import { Field, labelOf } from "./fields.js";

const USUAL = { scale: [0, 2, 0.05] }; // where a slider ends, where the declared bounds are far from what people use

export class Pictures extends Field {
  static kind = "pictures";
  rows = new Map(); // row → {file, inputs: {name: control}}

  build() {
    const input = el("input", { type: "file", class: "hidden-input", accept: "image/*", multiple: true, ...this.described, "aria-label": `Add to ${labelOf(this.name).toLowerCase()}` });
    input.addEventListener("change", () => {
      this.add([...input.files]);
      input.value = "";
    });
    return input;
  }

  /** The properties of an item, its picture aside. */
  get own() {
    return Object.entries(this.form.items.properties).filter(([name]) => name !== "picture");
  }

  body() {
    this.list = el("ul", { class: "picture-rows", "aria-label": labelOf(this.name) });
    return el("div", {}, this.list, el("label", { class: "chip" }, "Add pictures", this.input));
  }

  wrap() {
    const node = super.wrap();
    node.querySelector("label").replaceWith(el("span", { class: "label", title: this.help }, labelOf(this.name)));
    return node;
  }

  /** Take these files as new rows, with the usual values or with these. */
  add(files, values = {}) {
    for (const file of files) this.#row(file, values);
    this.changed();
  }

  #row(file, values) {
    const shown = el("img", { alt: file.name, src: URL.createObjectURL(file) });
    const inputs = {};
    const controls = this.own.map(([name, property]) => this.#control(name, property, values[name], file, inputs));
    const remove = tool("close", `Remove ${file.name}`, () => this.#remove(row));
    const row = el("li", { class: "picture-row" }, shown, el("span", { class: "file-name quiet" }, file.name), remove, ...controls);
    this.rows.set(row, { file, inputs });
    this.list.append(row);
  }

  #control(name, property, value, file, inputs) {
    const label = `${labelOf(name)} of ${file.name}`;
    if (property.enum) {
      const options = property.enum.map((word) => el("option", { value: word, selected: word === value }, word));
      inputs[name] = el("select", { "aria-label": label }, ...options);
      return inputs[name];
    }
    const [min, max, step] = USUAL[name] ?? [property.minimum ?? 0, property.maximum ?? 1, 0.05];
    const number = (inputs[name] = el("input", { type: "number", step: "any", inputmode: "decimal", value: value ?? property.default, "aria-label": label }));
    const range = el("input", { type: "range", min, max, step, value: number.value, "aria-label": `${label}, slider` });
    const rest = () => range.style.setProperty("--filled", `${(100 * (range.value - min)) / (max - min)}%`);
    range.addEventListener("input", () => (number.value = range.value) && rest());
    number.addEventListener("input", () => rest((range.value = number.value)));
    rest();
    return el("div", { class: "slider-row" }, el("span", { class: "quiet" }, labelOf(name)), range, number);
  }

  #remove(row) {
    this.#drop(row);
    this.input.focus();
    this.changed();
  }

  #drop(row) {
    URL.revokeObjectURL(row.querySelector("img").src);
    this.rows.delete(row);
    row.remove();
  }

  /** [{file, values}], or nothing where there are none. */
  get value() {
    const some = [...this.rows.values()].map(({ file, inputs }) => ({ file, values: read(inputs) }));
    return some.length ? some : undefined;
  }

  set value(some) {
    for (const row of [...this.rows.keys()]) this.#drop(row);
    for (const { file, values } of some ?? []) this.#row(file, values);
  }

  get unreadable() {
    const bad = [...this.list.querySelectorAll("input[type=number]")].find((input) => input.validity.badInput);
    return bad ? `${bad.getAttribute("aria-label")} cannot be read as a number.` : "";
  }
}

/** The values of a row; a number that is left empty is the server's to decide. */
function read(inputs) {
  const values = Object.entries(inputs).map(([name, input]) => [name, input.type === "number" ? number(input.value) : input.value]);
  return Object.fromEntries(values.filter(([, value]) => value !== undefined));
}

const number = (text) => (text === "" ? undefined : Number(text));
