// The settings form, made from /api/schema. A field that has a slot in index.html goes there, every other one into the
// section of its group; so a field that is declared tomorrow has a control tomorrow.
import { $, el } from "./dom.js";
import { labelOf, makeField } from "./fields.js";
import { makeSpecial } from "./special.js";

const guided = (form) => form.effective("guidance") > 0;
const unlessExact = (form) => form.effective("sigmas") === undefined; // exact noise levels leave nothing to choose
const beside = (...names) => (form) => names.some((name) => form.effective(name) !== undefined);
// What has an effect only beside something else. Without it the control is hidden and sends nothing.
const NEEDS = {
  negative: (form) => guided(form) || form.effective("nag") > 1,
  ...Object.fromEntries(["guidance_method", "cfg_truncation", "cfg_normalization"].map((name) => [name, guided])),
  ...Object.fromEntries(["steps", "schedule", "shift"].map((name) => [name, unlessExact])),
  mask: beside("image"),
  extend: beside("image"),
  strength: beside("image", "hires"),
  mask_invert: beside("mask"),
  ...Object.fromEntries(["mask_blur", "mask_crop", "paste"].map((name) => [name, beside("mask", "extend")])),
  reference: (form) => form.schema.vision.available,
  ...Object.fromEntries(["vision_blend", "vision_layer", "vision_tokens", "vision_text"].map((name) => [name, beside("reference")])),
  control: (form) => form.schema.control.names.length > 0,
  ...Object.fromEntries(["control_start", "control_end", "control_flow", "control_preprocess"].map((name) => [name, beside("control")])),
};
const LIMITS = { steps: "max_steps", images: "max_images", width: "max_side", height: "max_side" };
const DRAFT = "zimage.draft";

export class Form extends EventTarget {
  fields = new Map();
  #sections = new Map();

  constructor(schema) {
    super();
    this.schema = schema;
    for (const [name, property] of Object.entries(schema.request.properties)) this.#add(name, property);
    $("form").addEventListener("input", (event) => this.#touched(event));
    $("reset").addEventListener("click", () => this.reset());
    this.refresh();
  }

  #add(name, property) {
    const fallback = this.schema.defaults[name] ?? property.default ?? undefined;
    const bounded = withLimit(property, this.schema.limits[LIMITS[name]]);
    const field = makeSpecial(name, bounded, fallback) ?? makeField(name, bounded, fallback);
    this.fields.set(name, field);
    const slot = document.querySelector(`[data-slot="${name}"]`);
    if (slot) slot.append(field.node);
    slot?.closest("[data-faults]")?.append(field.message); // narrow controls share a wide place for what is wrong
    if (!slot) this.#section(property["x-group"] ?? "More").append(field.node);
  }

  #section(group) {
    if (!this.#sections.has(group)) {
      const title = el("summary", {}, el("span", {}, group), el("span", { class: "count" }));
      const section = el("details", { class: "group", "data-group": group }, title, el("div", { class: "group-body" }));
      $("groups").append(section);
      this.#sections.set(group, section);
    }
    return this.#sections.get(group).lastChild;
  }

  #touched(event) {
    this.fields.get(event.target.closest("[data-field]")?.dataset.field)?.fault("");
    this.refresh();
  }

  /** Show what has an effect, count what is set in each section, and tell the listeners. */
  refresh() {
    for (const [name, field] of this.fields) field.node.hidden = !this.#applies(name);
    for (const section of this.#sections.values()) {
      const inside = [...this.fields.values()].filter((field) => section.contains(field.node));
      const count = inside.filter((field) => field.value !== undefined && !field.node.hidden).length;
      section.querySelector(".count").textContent = count ? `${count} set` : "";
    }
    this.dispatchEvent(new Event("change"));
  }

  #applies(name) {
    return NEEDS[name]?.(this) ?? true;
  }

  field(name) {
    return this.fields.get(name);
  }

  effective(name) {
    return this.fields.get(name)?.effective;
  }

  /** What is set and has an effect: {values, files}, of a list an array each. `only` picks some of the fields. */
  read(only = () => true) {
    const values = {};
    const files = {};
    for (const [name, field] of this.fields) {
      const value = this.#applies(name) && only(field) ? field.value : undefined;
      if (value !== undefined && field.property["x-condition"]) {
        values[name] = value.map((one) => one.values);
        files[name] = value.map((one) => one.file);
      } else if (value !== undefined) (field.property["x-attachment"] ? files : values)[name] = value;
    }
    return { values, files };
  }

  /** The settings that make a caption of a prompt. */
  text() {
    return this.read(({ name, property }) => property["x-group"] === "Text" && !isFile(property) && name !== "negative").values;
  }

  /** Set these fields and leave all others open; attachments stay unless `values` holds them. */
  fill(values) {
    for (const [name, field] of this.fields) {
      if (!isFile(field.property)) field.value = values[name] ?? undefined;
      field.fault("");
    }
    this.refresh();
  }

  reset() {
    const prompt = this.field("prompt").value;
    this.fill({ prompt });
    for (const field of this.fields.values()) if (isFile(field.property)) field.value = undefined;
    this.refresh();
    this.dispatchEvent(new Event("reset"));
  }

  /** The first field that the browser cannot read, as a fault. */
  get unreadable() {
    for (const [name, field] of this.fields) if (field.unreadable) return { message: field.unreadable, fields: [name] };
    return null;
  }

  /** Show an error of the server: the message, and the fields that it names; the first of them gets the focus. */
  show({ message, fields }) {
    $("form-fault").textContent = message;
    const named = fields.map((name) => this.fields.get(name)).filter((field) => field && !field.node.hidden);
    named.forEach((field, index) => field.fault(index === 0 ? message : `see ${labelOf(named[0].name)}`));
    named[0]?.node.closest("details")?.setAttribute("open", "");
    named[0]?.input.focus();
  }

  clearFaults() {
    $("form-fault").textContent = "";
    for (const field of this.fields.values()) field.fault("");
  }
}

/** Whether a field holds files of the user's, one or several, which no record carries. */
export const isFile = (property) => Boolean(property["x-attachment"] || property["x-condition"]);

const withLimit = (property, limit) =>
  limit === undefined || property.maximum === undefined ? property : { ...property, maximum: Math.min(property.maximum, limit) };

/** Keep what is typed over a reload, in this browser alone. */
export function keepDraft(text) {
  try {
    localStorage.setItem(DRAFT, text);
  } catch {
    // A browser that stores nothing, or is full: the draft is a comfort, rendering does not need it.
  }
}

export function draft() {
  try {
    return localStorage.getItem(DRAFT);
  } catch {
    return null;
  }
}
