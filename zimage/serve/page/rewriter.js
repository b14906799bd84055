// Short ideas rewritten into full prompts; the result can be edited before it is taken.
import * as api from "./api.js";
import { $, closable } from "./dom.js";
import { listChoices } from "./choices.js";
import { makeField } from "./fields.js";

export class Rewriter {
  #fields = new Map();
  #chosen = null;
  #running = null;

  constructor(form) {
    this.form = form;
    closable($("rewriter")).addEventListener("close", () => this.#running?.abort());
    $("open-rewriter").addEventListener("click", () => this.open());
    $("rewriter-run").addEventListener("click", () => this.#run());
    $("rewriter-use").addEventListener("click", () => this.#take());
    $("rewriter-always").addEventListener("change", () => this.#label());
    for (const [name, property] of Object.entries(form.schema.rewrite.properties)) {
      if (name !== "rewriter") this.#add(name, property);
    }
  }

  #add(name, property) {
    const field = makeField(name, property, this.form.schema.defaults[name] ?? property.default ?? undefined);
    this.#fields.set(name, field);
    $("rewriter-fields").append(field.node);
  }

  /** What rewrites at every render; nothing unless that is switched on. */
  get values() {
    return $("rewriter-always").checked ? this.#asked() : {};
  }

  #asked() {
    const set = [...this.#fields].map(([name, field]) => [name, field.value]).filter(([, value]) => value !== undefined);
    return { rewriter: this.#chosen, ...Object.fromEntries(set) };
  }

  async open() {
    const [{ templates }, config] = await Promise.all([api.rewriters(), api.rewriterConfig()]);
    this.#chosen ??= config.default ?? templates[0]?.name;
    listChoices($("rewriter-list"), "rewriter-choice", templates, this.#chosen, ({ name }) => {
      this.#chosen = name;
      this.#label();
    });
    $("rewriter-idea").value = this.form.field("prompt").value ?? "";
    $("rewriter-result").value = "";
    this.#state("");
    $("rewriter").showModal();
    $("rewriter-idea").focus();
  }

  async #run() {
    this.#running?.abort();
    const running = (this.#running = new AbortController());
    this.#state("Writing…");
    $("rewriter").setAttribute("aria-busy", "true");
    try {
      this.#show(await api.rewrite({ prompt: $("rewriter-idea").value, ...this.#asked() }, running.signal));
    } catch (error) {
      if (error.name !== "AbortError") this.#fail(error);
    } finally {
      $("rewriter").removeAttribute("aria-busy");
    }
  }

  #show({ prompt, thinking }) {
    $("rewriter-result").value = prompt;
    $("rewriter-thinking").hidden = !thinking;
    $("rewriter-thinking").querySelector("p").textContent = thinking ?? "";
    this.#state("");
    $("rewriter-result").focus();
  }

  #fail(error) {
    this.#state(error.message);
    for (const name of error.fields ?? []) this.#fields.get(name)?.fault(error.message);
  }

  #state(text) {
    $("rewriter-state").textContent = text;
    $("rewriter-use").disabled = false;
    for (const field of this.#fields.values()) field.fault("");
  }

  /** The result, or the idea where nothing was rewritten. */
  #take() {
    const prompt = this.form.field("prompt");
    prompt.value = $("rewriter-result").value || $("rewriter-idea").value;
    prompt.changed();
    $("rewriter").close();
    prompt.input.focus();
  }

  #label() {
    const always = $("rewriter-always").checked;
    $("open-rewriter").lastElementChild.textContent = always ? this.#chosen : "Rewrite";
    $("open-rewriter").classList.toggle("on", always);
  }
}
