// A control for each kind of declared field. What is left open has no value, so that the server decides it.
import { el, tool } from "./dom.js";

const LABELS = {
  prompt: "Prompt",
  negative: "Negative prompt",
  images: "Pictures",
  hires: "Two passes, enlarged by",
  image: "Picture to start from",
  reference: "References",
  control: "Controls",
  vision_blend: "Mixed in by",
  control_preprocess: "Made from them first",
  model: "File",
  extend: "Extend by",
  paste: "Paste back",
  nag: "Attention guidance (NAG)",
  sigmas: "Noise levels",
  cfg_truncation: "Guidance truncation",
  cfg_normalization: "Guidance normalisation",
  template: "Template",
};
const PLACEHOLDERS = { prompt: "Describe the picture", negative: "What to steer away from" };
const LONG_TEXT = 1000; // characters; a text that may be longer gets an area of its own
// Where a slider ends: the declared bounds are what can be computed, these are what people use.
const USUAL = { steps: [1, 50, 1], guidance: [0, 10, 0.1], shift: [0.5, 10, 0.1], strength: [0.05, 1, 0.05], variety: [0, 2, 0.05], hires: [1.1, 4, 0.1] };

export const labelOf = (name) => LABELS[name] ?? name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

/** The declared help, in which flags of the command line become the labels that stand on the page. */
const helpOf = (text = "") => text.replaceAll("`", "").replace(/--([a-z][a-z-]*)/g, (_, flag) => `“${labelOf(flag.replaceAll("-", "_"))}”`);

/** The forms that a value may have, without null: [{type, …}]. */
function formsOf(property) {
  return (property.anyOf ?? [property]).map((form) => ({ ...form, type: [form.type].flat().find((type) => type !== "null") }));
}
const mayBeNull = (property) => (property.anyOf ?? [property]).some((form) => [form.type].flat().includes("null"));

/** What all controls share: label, help, the message of a fault, and "open" as the value undefined. */
export class Field {
  constructor(name, property, fallback) {
    this.name = name;
    this.property = property;
    this.form = formsOf(property)[0];
    this.fallback = fallback; // what the server takes where the control is left open, if it is known
    this.help = helpOf(property.description);
    this.message = el("p", { class: "fault", id: `fault-${name}`, hidden: true });
    this.input = this.build();
    this.node = this.wrap();
  }

  get id() {
    return `field-${this.name}`;
  }

  get described() {
    return { id: this.id, name: this.name, "aria-describedby": `help-${this.name} fault-${this.name}` };
  }

  wrap() {
    const help = el("p", { class: "help", id: `help-${this.name}` }, this.help);
    const label = el("label", { for: this.id, title: this.help }, labelOf(this.name));
    return el("div", { class: `field ${this.constructor.kind}`, "data-field": this.name }, label, this.body(), help, this.message);
  }

  body() {
    return this.input;
  }

  get value() {
    return this.input.value.trim() === "" ? undefined : this.input.value;
  }

  set value(value) {
    this.input.value = value ?? "";
  }

  /** What holds if the control is left as it is. */
  get effective() {
    return this.value ?? this.fallback;
  }

  fault(text) {
    this.message.textContent = text;
    this.message.hidden = !text;
    if (text) this.input.setAttribute("aria-invalid", "true");
    else this.input.removeAttribute("aria-invalid");
  }

  /** What the browser could not read; all else is the server's to judge. */
  get unreadable() {
    return this.input.validity?.badInput ? `${labelOf(this.name)} cannot be read as a number.` : "";
  }

  /** Tell whoever listens that the value was changed by the page, not by typing. */
  changed() {
    this.input.dispatchEvent(new Event("input", { bubbles: true }));
  }
}

class Text extends Field {
  static kind = "text";
  build() {
    const list = this.form.examples && `examples-${this.name}`;
    return el("input", { type: "text", spellcheck: "false", list, ...this.described, placeholder: shown(this.fallback) });
  }

  body() {
    const words = this.form.examples?.map((word) => el("option", { value: word }));
    return words ? el("div", {}, this.input, el("datalist", { id: `examples-${this.name}` }, ...words)) : this.input;
  }
}

/** Text whose line breaks count and whose spaces are the user's. */
export class Area extends Field {
  static kind = "area";
  build() {
    return el("textarea", { rows: 2, maxlength: this.form.maxLength, ...this.described, placeholder: PLACEHOLDERS[this.name] });
  }

  get value() {
    return this.input.value === "" ? undefined : this.input.value;
  }

  set value(value) {
    this.input.value = Array.isArray(value) ? value.join("\n") : (value ?? "");
  }
}

class Number_ extends Field {
  static kind = "number";
  build() {
    const { minimum, exclusiveMinimum, maximum, multipleOf, type } = this.form;
    const step = multipleOf ?? (type === "integer" ? 1 : "any");
    const bounds = { min: minimum ?? exclusiveMinimum, max: maximum, step };
    return el("input", { type: "number", inputmode: type === "integer" ? "numeric" : "decimal", ...bounds, ...this.described, placeholder: shown(this.fallback) });
  }

  get value() {
    return this.input.value === "" ? undefined : Number(this.input.value);
  }

  set value(value) {
    this.input.value = value ?? "";
  }
}

/** A number with a slider. Left open, the slider rests where the server would put it. */
class Slider extends Number_ {
  static kind = "slider";
  body() {
    const [min, max, step] = sliderOf(this.name, this.form);
    this.range = el("input", { type: "range", min, max, step, "aria-label": `${labelOf(this.name)}, slider` });
    this.clear = tool("close", `Leave ${labelOf(this.name).toLowerCase()} open`, () => this.reset(), { hidden: true });
    this.range.addEventListener("input", () => {
      this.input.value = this.range.value;
      this.rest();
    });
    this.input.addEventListener("input", () => this.rest());
    this.rest();
    return el("div", { class: "slider-row" }, this.range, this.clear, this.input);
  }

  rest() {
    const { min, max } = this.range;
    this.range.value = this.value ?? this.fallback ?? min;
    this.clear.hidden = this.value === undefined;
    this.range.classList.toggle("open", this.value === undefined);
    this.range.classList.toggle("unknown", this.effective === undefined);
    this.range.style.setProperty("--filled", `${(100 * (this.range.value - min)) / (max - min)}%`);
  }

  reset() {
    this.value = undefined;
    this.input.focus();
    this.changed();
  }

  get value() {
    return super.value;
  }

  set value(value) {
    this.input.value = value ?? "";
    this.rest();
  }
}

/** One of several words. The first choice leaves it open. */
class Choice extends Field {
  static kind = "select";
  build() {
    const words = this.form.enum.filter((word) => word !== null);
    const shown = (word) => this.property["x-labels"]?.[word] ?? worded(word);
    const text = this.name === "preset" ? "None" : "Default";
    const open = el("option", { value: "" }, this.fallback ? `${text}: ${shown(this.fallback)}` : text);
    return el("select", this.described, open, ...words.map((word) => el("option", { value: word }, shown(word))));
  }
}

/** Yes, no, or left open. */
class Tristate extends Field {
  static kind = "select";
  build() {
    const options = [["", "Default"], ["true", "Always"], ["false", "Never"]];
    return el("select", this.described, ...options.map(([value, text]) => el("option", { value }, text)));
  }

  get value() {
    return { true: true, false: false }[this.input.value];
  }

  set value(value) {
    this.input.value = value ?? "";
  }
}

/** On or off. As the server has it, it is left open. */
class Switch extends Field {
  static kind = "switch-field";
  build() {
    return el("input", { type: "checkbox", role: "switch", ...this.described, checked: Boolean(this.fallback) });
  }

  wrap() {
    const help = el("p", { class: "help", id: `help-${this.name}` }, this.help);
    const label = el("label", { class: "switch", title: this.help }, this.input, el("span", {}, labelOf(this.name)));
    return el("div", { class: "field switch-field", "data-field": this.name }, label, help, this.message);
  }

  get value() {
    return this.input.checked === Boolean(this.fallback) ? undefined : this.input.checked;
  }

  set value(value) {
    this.input.checked = value ?? Boolean(this.fallback);
  }
}

/** Whole numbers of any size, one or several: 1, 2, 3. Anything else goes to the server, which says what is wrong. */
export class Whole extends Field {
  static kind = "whole";
  build() {
    return el("input", { type: "text", inputmode: "numeric", spellcheck: "false", ...this.described, placeholder: this.fallback === undefined ? "random" : shown(this.fallback) });
  }

  get value() {
    const parts = this.input.value.split(",").map((part) => part.trim()).filter(Boolean).map(whole);
    return parts.length > 1 ? parts : parts[0];
  }

  set value(value) {
    this.input.value = [value ?? []].flat().join(", ");
  }
}

const whole = (text) => (/^-?\d+$/.test(text) ? exact(BigInt(text)) : text);
const exact = (big) => (Number.isSafeInteger(Number(big)) ? Number(big) : big);

/** A file of the user's, sent beside the request. */
export class Attachment extends Field {
  static kind = "attachment";
  file = undefined;

  build() {
    const accept = this.name === "embeddings" ? ".safetensors" : undefined;
    const input = el("input", { type: "file", class: "hidden-input", accept, ...this.described });
    input.addEventListener("change", () => this.set(input.files[0]));
    return input;
  }

  body() {
    this.chosen = el("span", { class: "quiet file-name" });
    this.clear = tool("close", `Remove ${labelOf(this.name).toLowerCase()}`, () => this.set(undefined), { hidden: true });
    const choose = el("label", { class: "chip" }, "Choose file", this.input);
    return el("div", { class: "file-row" }, ...this.others(), choose, this.chosen, this.clear);
  }

  /** Other ways to make the file. */
  others() {
    return [];
  }

  wrap() {
    const node = super.wrap();
    node.querySelector("label").replaceWith(el("span", { class: "label" }, labelOf(this.name)));
    this.input.setAttribute("aria-label", labelOf(this.name));
    return node;
  }

  get value() {
    return this.file;
  }

  set value(file) {
    this.file = file;
    this.chosen.textContent = file?.name ?? "";
    this.clear.hidden = !file;
    if (!file) this.input.value = "";
  }

  set(file) {
    this.value = file;
    this.changed();
  }
}

const shown = (value) => (value === undefined || value === null || value === "" ? "auto" : String(value));
const worded = (word) => String(word).replaceAll("_", " ");

function sliderOf(name, { minimum, exclusiveMinimum, maximum, type }) {
  if (USUAL[name]) return USUAL[name];
  const low = minimum ?? exclusiveMinimum;
  const isShort = low !== undefined && maximum !== undefined && maximum - low <= 10;
  return isShort && type === "number" ? [low, maximum, 0.01] : null;
}

const isText = (form) => form.type === "string";

/** The class of control that a property asks for. */
function kindOf(name, property) {
  const [form, ...others] = formsOf(property);
  if (property["x-attachment"]) return Attachment;
  if (form.enum) return Choice;
  if (form.type === "boolean") return mayBeNull(property) ? Tristate : Switch;
  if (form.type === "integer" && others.some((other) => other.type === "array")) return Whole;
  if (form.type === "integer" && form.maximum > Number.MAX_SAFE_INTEGER) return Whole;
  if (form.type === "integer" || form.type === "number") return sliderOf(name, form) ? Slider : Number_;
  return isText(form) && form.maxLength >= LONG_TEXT ? Area : Text;
}

/** The control of a declared field. `fallback` is the server's default, where it is known. */
export function makeField(name, property, fallback) {
  return new (kindOf(name, property))(name, property, fallback);
}
