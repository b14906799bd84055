// Pictures that the model looks at: what looks at them, and what it sees as a file for "Embeddings" of a later render.
import * as api from "./api.js";
import { $, el } from "./dom.js";

const SETTINGS = ["vision_layer", "vision_tokens", "vision_text"];

export class Vision {
  constructor(form) {
    this.form = form;
    const { available, name, mode } = form.schema.vision;
    $("references").hidden = !available;
    $("controls").hidden = form.schema.control.names.length === 0;
    $("vision-model").textContent = [name, mode].filter(Boolean).join(" · ");
    $("save-sight").addEventListener("click", () => this.#save());
    form.addEventListener("change", () => this.#refresh());
    this.#refresh();
  }

  get #pictures() {
    return this.form.field("reference").value ?? [];
  }

  #refresh() {
    $("save-sight").hidden = this.#pictures.length !== 1;
    $("sight-fault").textContent = "";
  }

  async #save() {
    const [{ file }] = this.#pictures;
    const { values } = this.form.read(({ name }) => SETTINGS.includes(name));
    $("save-sight").setAttribute("aria-busy", "true");
    try {
      const seen = await api.extract(values, file);
      const link = el("a", { href: URL.createObjectURL(seen), download: `${file.name.replace(/\.[^.]*$/, "")}.safetensors` });
      link.click();
      URL.revokeObjectURL(link.href);
    } catch (error) {
      $("sight-fault").textContent = error.message;
    } finally {
      $("save-sight").removeAttribute("aria-busy");
    }
  }
}
