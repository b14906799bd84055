// Nicer controls of fields that every picture has: template, seed, the picture to start from and its mask.
import { el, icon, tool } from "./dom.js";
import { Attachment, Field, labelOf, Whole } from "./fields.js";
import { Pictures } from "./pictures.js";

/** A button that opens the template picker, and shows what is chosen. */
class Template extends Field {
  static kind = "template";
  build() {
    return el("button", { type: "button", class: "chip", ...this.described }, icon("template"), el("span", {}, "Template"));
  }

  wrap() {
    this.clear = tool("close", "No template", () => this.set(undefined), { hidden: true });
    const help = el("span", { class: "help", id: `help-${this.name}` }, this.help);
    return el("div", { class: "field template", "data-field": this.name }, this.input, this.clear, help, this.message);
  }

  get value() {
    return this.input.value || undefined;
  }

  set value(name) {
    this.input.value = name ?? "";
    this.input.lastChild.textContent = name ?? "Template";
    this.clear.hidden = !name;
  }

  set(name) {
    this.value = name;
    this.changed();
  }
}

/** A number with dice and lock. Locked, every render takes it; open, the server draws one. */
class Seed extends Whole {
  static kind = "seed";
  last = undefined; // the seed of the picture that is shown

  body() {
    this.dice = tool("dice", "Throw a new seed", () => this.set(thrown()));
    this.lock = tool("lock", "Keep this seed", () => this.set(this.value === undefined ? (this.last ?? thrown()) : undefined));
    this.reuse = tool("reuse", "Take the seed of the picture shown", () => this.set(this.last));
    this.input.addEventListener("input", () => this.rest());
    return el("div", { class: "seed-row" }, this.input, this.dice, this.lock, this.reuse);
  }

  rest() {
    this.lock.setAttribute("aria-pressed", String(this.value !== undefined));
    this.reuse.disabled = this.last === undefined;
  }

  get value() {
    return super.value;
  }

  set value(value) {
    super.value = value;
    this.rest();
  }

  set(value) {
    this.value = value;
    this.changed();
  }

  shownSeed(seed) {
    this.last = seed;
    this.rest();
  }
}

const thrown = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** A place to drop a picture on, or to choose one; it shows what was chosen. */
class Picture extends Attachment {
  static kind = "start";

  body() {
    const text = el("span", { class: "zone-text" }, el("strong", {}, "Drop a picture"), " or choose one");
    this.zone = el("label", { class: "zone" }, icon("image"), text, this.input);
    this.shown = el("img", { alt: "Picture to start from" });
    this.clear = tool("close", "Remove the picture", () => this.set(undefined));
    this.chosen = el("span", { class: "file-name quiet" });
    this.card = el("div", { class: "zone-card", hidden: true }, this.shown, this.chosen, this.clear);
    return el("div", {}, this.zone, this.card);
  }

  get value() {
    return super.value;
  }

  set value(file) {
    if (this.shown.src) URL.revokeObjectURL(this.shown.src);
    super.value = file;
    this.zone.hidden = Boolean(file);
    this.card.hidden = !file;
    if (file) this.shown.src = URL.createObjectURL(file);
    else this.shown.removeAttribute("src");
  }
}

/** What of the picture is repainted: painted here, or a file. */
class Mask extends Attachment {
  others() {
    return [el("button", { type: "button", class: "chip", id: "open-painter" }, icon("brush"), el("span", {}, "Paint"))];
  }
}

const SIDES = ["left", "top", "right", "bottom"];

/** How far a picture is extended on each side: four numbers, sent as LEFT,TOP,RIGHT,BOTTOM. */
class Margins extends Field {
  static kind = "margins";

  build() {
    const number = (side) => ({ type: "number", min: 0, step: 8, inputmode: "numeric", placeholder: side, "aria-label": `${labelOf(this.name)}, ${side}, in pixels` });
    const [first, ...others] = SIDES.map((side, index) => el("input", { ...number(side), ...(index ? {} : this.described) }));
    this.sides = [first, ...others];
    return first;
  }

  body() {
    return el("div", { class: "margin-row" }, ...this.sides);
  }

  get value() {
    const numbers = this.sides.map((side) => side.value || "0");
    return numbers.every((number) => number === "0") ? undefined : numbers.join(",");
  }

  set value(text) {
    const numbers = text?.split(",") ?? [];
    this.sides.forEach((side, index) => (side.value = Number(numbers[index]) || ""));
  }

  get unreadable() {
    const bad = this.sides.find((side) => side.validity.badInput);
    return bad ? `${bad.getAttribute("aria-label")}: this cannot be read as a number.` : "";
  }
}

const SPECIAL = { template: Template, seed: Seed, image: Picture, mask: Mask, extend: Margins };

/** The control of a well-known field, or of a list of pictures, if it has one of its own. */
export function makeSpecial(name, property, fallback) {
  const Kind = SPECIAL[name] ?? (property["x-condition"] ? Pictures : undefined);
  return Kind && new Kind(name, property, fallback);
}

