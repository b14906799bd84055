// The template picker: search, and a preview of what the chosen one adds.
import * as api from "./api.js";
import { $, closable, el } from "./dom.js";
import { listChoices, matching, partsOf } from "./choices.js";

export class Templates {
  #all = null;
  #chosen = null;

  constructor(form) {
    this.form = form;
    closable($("templates"));
    form.field("template").input.addEventListener("click", () => this.open());
    $("template-search").addEventListener("input", () => this.#list());
    $("template-none").addEventListener("click", () => this.#take(undefined));
    $("template-use").addEventListener("click", () => this.#take(this.#chosen?.name));
    $("templates").addEventListener("keydown", (event) => this.#key(event));
  }

  async all() {
    this.#all ??= (await api.templates()).templates;
    return this.#all;
  }

  async open() {
    const name = this.form.field("template").value;
    this.#chosen = (await this.all()).find((template) => template.name === name) ?? null;
    $("template-search").value = "";
    this.#list();
    this.#preview();
    $("templates").showModal();
    $("template-search").focus();
    $("template-list").querySelector(":checked")?.scrollIntoView({ block: "center" });
  }

  #list() {
    const found = matching(this.#all, $("template-search").value);
    listChoices($("template-list"), "template-choice", found, this.#chosen?.name, (template) => {
      this.#chosen = template;
      this.#preview();
    });
    if (!found.length) $("template-list").append(el("p", { class: "quiet none" }, "No template has these words."));
  }

  async #preview() {
    const template = this.#chosen;
    $("template-use").disabled = !template;
    if (!template) return $("template-preview").replaceChildren(el("p", { class: "quiet" }, "A template says how a picture looks, not what it shows."));
    const count = el("p", { class: "quiet" });
    const parts = partsOf(template).flatMap(([title, text]) => [el("h4", {}, title), el("p", { class: "part" }, text)]);
    $("template-preview").replaceChildren(el("h3", {}, template.name), el("p", {}, template.description), count, ...parts);
    const { tokens, limit } = await api.format({ prompt: this.form.field("prompt").value ?? "", template: template.name });
    count.textContent = `${tokens.toLocaleString()} of ${limit.toLocaleString()} tokens with your prompt`;
  }

  #take(name) {
    this.form.field("template").set(name);
    $("templates").close();
    this.form.field("template").input.focus();
  }

  #key(event) {
    const isChoice = event.target.closest("#template-list, #template-search");
    if (event.key !== "Enter" || !isChoice || !this.#chosen) return;
    event.preventDefault();
    this.#take(this.#chosen.name);
  }
}
