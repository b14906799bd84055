// The prompt's tokens, counted by the server while it is typed.
import * as api from "./api.js";
import { $, debounced } from "./dom.js";
import { encode } from "./http.js";

const NEAR = 0.9; // of the limit: from here on the count is yellow

export class TokenCount {
  #asked = null;
  #last = null; // the request that was counted last, so that other settings cost no question

  constructor(form) {
    this.form = form;
    this.limit = form.schema.limits.token_limit;
    form.addEventListener("change", debounced(() => this.#count(), 250));
    $("shorten").addEventListener("click", () => this.#showLongPrompt());
    this.#count();
  }

  async #count() {
    const request = this.form.text();
    const text = encode(request);
    if (text === this.#last) return;
    this.#last = text;
    this.#asked?.abort();
    this.#asked = new AbortController();
    try {
      this.#show(await api.format({ prompt: "", ...request }, this.#asked.signal));
    } catch (error) {
      if (error.name !== "AbortError") this.#show({ tokens: null, outcome: error.message });
    }
  }

  #show({ tokens, limit = this.limit, outcome }) {
    const share = tokens === null ? 0 : tokens / limit;
    const level = share > 1 ? "over" : share >= NEAR ? "near" : "fine";
    const counted = `${(tokens ?? 0).toLocaleString()} / ${limit.toLocaleString()}`;
    $("token-count").textContent = tokens === null ? outcome : share > 1 ? `${counted} tokens, past the trained length` : counted;
    $("token-meter").value = Math.min(share, 1);
    $("counter").dataset.level = tokens === null ? "unknown" : level;
    $("shorten").hidden = level !== "over" || !this.form.field("long_prompt");
  }

  #showLongPrompt() {
    const field = this.form.field("long_prompt");
    field.node.closest("details")?.setAttribute("open", "");
    field.input.focus();
  }
}

/** Let a text area grow with its text, up to what CSS allows. */
export function growing(area) {
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", fit);
  return fit;
}
