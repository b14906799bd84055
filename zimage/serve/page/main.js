// The page put together: what each part tells, and what the others do about it.
import * as api from "./api.js";
import { acceptDrops } from "./drop.js";
import { $, closable, debounced, el } from "./dom.js";
import { labelOf } from "./fields.js";
import { draft, Form, keepDraft } from "./form.js";
import { History } from "./history.js";
import { encode, onUnauthorised, parse } from "./http.js";
import { isActive, Jobs } from "./jobs.js";
import { listenToKeys } from "./keys.js";
import { Loras } from "./loras.js";
import { Painter } from "./painter.js";
import { settingsOf } from "./png.js";
import { growing, TokenCount } from "./prompt.js";
import { Queue } from "./queue.js";
import { filesOf, valuesOf } from "./reuse.js";
import { Rewriter } from "./rewriter.js";
import { signIn } from "./signin.js";
import { Size } from "./size.js";
import { Stage } from "./stage.js";
import { Templates } from "./templates.js";
import { toast } from "./toast.js";
import { Viewer } from "./viewer.js";
import { Vision } from "./vision.js";

const EXAMPLES = ["a cat face on a blue background", "a fox and an owl", "a red apple"];

class Page {
  constructor(schema) {
    this.schema = schema;
    this.form = new Form(schema);
    this.size = new Size(this.form);
    this.loras = new Loras(this.form);
    this.templates = new Templates(this.form);
    this.rewriter = new Rewriter(this.form);
    this.painter = new Painter(this.form);
    this.vision = new Vision(this.form);
    this.jobs = new Jobs();
    this.stage = new Stage(this.jobs);
    this.queue = new Queue(this.jobs);
    this.history = new History();
    this.viewer = new Viewer(this.history);
    this.comparing = null; // the picture that waits for another one
  }

  async start() {
    this.#describe();
    this.#connectForm();
    this.#connectJobs();
    this.#connectPictures();
    this.#connectFiles();
    const keys = { render: () => this.render(), cancel: () => this.cancel(), step: (by) => this.history.step(by) };
    listenToKeys({ ...keys, view: () => this.stage.image && this.viewer.open(this.stage.image), remove: () => this.stage.image && this.remove(this.stage.image) });
    await Promise.all([this.history.load(), this.jobs.load()]);
    this.stage.show(this.history.images[0] ?? null);
    this.follow();
    new TokenCount(this.form);
    api.listen((name, data) => this.jobs.take(name, data), (isOn) => this.#connected(isOn));
    document.documentElement.dataset.ready = "true";
  }

  /** Events before the connection are lost, and in a break many may be: ask what holds now. */
  async #connected(isOn) {
    const wasOff = $("connection").textContent !== "";
    $("connection").textContent = isOn ? "" : "Connecting…";
    if (isOn) await this.#try(() => this.jobs.load(), () => wasOff && this.history.load());
  }

  #describe() {
    const { model, dtype, device } = this.schema;
    $("model").textContent = [model.is_demo ? "demo model" : model.name, dtype, device].filter(Boolean).join(" · ");
    if (/Mac|iPhone|iPad/.test(navigator.platform)) $("render").querySelector("kbd").textContent = "⌘ ↵";
  }

  #connectForm() {
    $("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.render();
    });
    this.grow = growing(this.form.field("prompt").input);
    const kept = draft();
    if (kept) this.#restoreDraft(kept);
    this.form.addEventListener("change", debounced(() => keepDraft(encode(this.request().values)), 300));
    this.form.addEventListener("change", () => this.grow());
    this.grow();
  }

  /** A draft that another version wrote must not keep the page from starting. */
  #restoreDraft(text) {
    try {
      const { lora = [], ...values } = parse(text);
      this.form.fill(values);
      this.loras.fill(lora);
    } catch {
      keepDraft("");
    }
  }

  #connectJobs() {
    this.jobs.addEventListener("image", ({ detail }) => this.history.add(detail));
    this.jobs.addEventListener("history", ({ detail }) => (detail.deleted ? this.#gone(detail.deleted) : this.history.load()));
    this.jobs.addEventListener("end", ({ detail: job }) => {
      if (job.state === "failed") toast(job.error?.message ?? "The render failed.", { isFault: true });
      for (const note of job.state === "done" ? job.notes : []) toast(note);
    });
    this.queue.addEventListener("show", ({ detail }) => this.follow(detail));
    this.queue.addEventListener("cancel", ({ detail }) => this.cancel(detail));
    this.queue.addEventListener("move", ({ detail }) => this.move(detail));
  }

  #connectPictures() {
    const on = { use: (image) => this.use(image.settings), start: (image) => this.startFrom(image), view: (image) => this.viewer.open(image) };
    const more = { compare: (image) => this.#pick(image), delete: (image) => this.remove(image), cancel: (id) => this.cancel(id), ended: () => this.follow() };
    for (const [name, act] of Object.entries({ ...on, ...more })) this.stage.addEventListener(name, ({ detail }) => act(detail));
    this.stage.addEventListener("shown", ({ detail }) => this.#shown(detail));
    this.stage.addEventListener("empty", ({ detail }) => this.#examples(detail));
    this.history.addEventListener("chosen", ({ detail }) => this.#chosen(detail));
    $("pick-stop").addEventListener("click", () => this.#pick(null));
    $("clear-history").addEventListener("click", () => this.#askToClear());
    $("confirm-yes").addEventListener("click", () => this.#clear());
    closable($("confirm"));
  }

  #connectFiles() {
    acceptDrops((target, file) => (target === "settings" ? this.useFile(file) : this.form.field("image").set(file)));
    $("settings-file").addEventListener("change", ({ target }) => {
      if (target.files[0]) this.useFile(target.files[0]);
      target.value = "";
    });
  }

  /** What is asked for: the form, the LoRAs, and the rewriter where it is on. */
  request() {
    const { values, files } = this.form.read();
    const lora = this.loras.values;
    return { values: { ...values, ...(lora.length ? { lora } : {}), ...this.rewriter.values }, files };
  }

  async render() {
    this.form.clearFaults();
    const fault = this.form.unreadable;
    if (fault) return this.form.show(fault);
    const { values, files } = this.request();
    $("render").setAttribute("aria-busy", "true");
    try {
      const job = this.jobs.meet(await api.submit(values, files));
      this.follow(isActive(job) ? undefined : job.id); // a small picture may be there before the answer is
      if (matchMedia("(max-width: 719px)").matches) $("stage").scrollIntoView({ block: "start" });
    } catch (error) {
      this.form.show({ message: error.message, fields: error.fields ?? [] });
    } finally {
      $("render").removeAttribute("aria-busy");
    }
  }

  /** Watch a job on the stage: the one that runs, unless another is named. */
  follow(id = this.jobs.active[0]?.id) {
    if (!id) return;
    this.stage.follow(id);
    this.history.choose(null);
  }

  async cancel(id = this.stage.following?.id ?? this.jobs.active[0]?.id) {
    if (this.comparing) return this.#pick(null);
    if (!id) return;
    await this.#try(() => api.cancel(id), (job) => toast(`Cancelled: ${[job.request.prompt].flat()[0] || "no prompt"}`));
  }

  async move({ id, distance }) {
    const { position } = this.jobs.get(id);
    await this.#try(() => api.move(id, Math.max(0, position + distance)), () => this.jobs.load());
  }

  #shown(image) {
    this.history.choose(image?.id ?? null);
    this.form.field("seed").shownSeed(image?.seed);
  }

  #chosen(image) {
    const left = this.comparing;
    if (!left) return this.stage.show(image);
    this.#pick(null);
    this.viewer.compare(left, image);
  }

  #pick(image) {
    this.comparing = image;
    $("pick").hidden = !image;
    document.body.classList.toggle("picking", Boolean(image));
    if (image) $("grid").querySelector(".tile[tabindex='0']")?.focus();
  }

  #examples(hint) {
    if (!this.schema.model.is_demo) return;
    const take = (text) => () => {
      this.form.field("prompt").value = text;
      this.form.field("prompt").changed();
      this.form.field("prompt").input.focus();
    };
    const chips = EXAMPLES.map((text) => el("button", { type: "button", class: "chip", onclick: take(text) }, text));
    hint.append(el("p", { class: "quiet" }, "The demo model draws one or two things on a plain ground:"), el("div", { class: "examples" }, ...chips));
  }

  async remove(image) {
    await this.#try(() => api.remove(image.id), ({ deleted }) => this.#removed(deleted, "Picture deleted."));
  }

  #removed(ids, text) {
    this.#gone(ids);
    toast(text, { undo: () => this.#try(() => api.restore(ids), () => this.history.load()) });
  }

  #gone(ids) {
    const neighbour = this.history.drop(ids);
    if (neighbour !== undefined && !this.stage.following) this.stage.show(neighbour);
    else if (ids.includes(this.stage.image?.id) && !this.stage.following) this.stage.show(null);
  }

  #askToClear() {
    $("confirm-text").textContent = `${$("history-total").textContent} pictures. This can be undone for some minutes.`;
    $("confirm").showModal();
  }

  async #clear() {
    $("confirm").close();
    await this.#try(() => api.removeAll(), ({ deleted }) => this.#removed(deleted, `${deleted.length} pictures deleted.`));
  }

  /** Put the settings of a picture's record into the form. */
  async use(record) {
    this.form.clearFaults();
    this.form.fill(valuesOf(record, this.form, await this.templates.all()));
    const absent = this.loras.fill(record.lora ?? []);
    const files = filesOf(record, this.form);
    const missing = [...files.map((name) => labelOf(name).toLowerCase()), ...absent];
    if (missing.length) toast(`The settings are in the form. The picture was also made from what it does not carry: ${missing.join(", ")}.`);
    else toast("The settings are in the form.");
  }

  async useFile(file) {
    const record = await settingsOf(file);
    if (record) await this.use(record);
    else toast(`${file.name} carries no settings of zimage.`, { isFault: true });
  }

  async startFrom(image) {
    const blob = await (await fetch(image.url)).blob();
    this.form.field("image").set(new File([blob], `${image.id}.png`, { type: "image/png" }));
    $("source").scrollIntoView({ block: "nearest" });
  }

  async #try(action, then) {
    try {
      then(await action());
    } catch (error) {
      toast(error.message, { isFault: true });
    }
  }
}

onUnauthorised(signIn);
window.addEventListener("unhandledrejection", ({ reason }) => toast(reason.message, { isFault: true }));
api.schema().then((schema) => new Page(schema).start());
