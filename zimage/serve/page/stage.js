// The picture: what is being drawn, with progress and preview, or one that is finished, with what can be done with it.
import { $, el, tool, icon, shape } from "./dom.js";
import { described, fraction, isActive, seconds } from "./jobs.js";

export class Stage extends EventTarget {
  job = null; // id of the job that is followed
  image = null; // the finished picture that is shown

  constructor(jobs) {
    super();
    this.jobs = jobs;
    jobs.addEventListener("change", ({ detail }) => detail.id === this.job && this.#draw());
    jobs.addEventListener("end", ({ detail }) => detail.id === this.job && this.#ended(detail));
    $("cancel").addEventListener("click", () => this.#tell("cancel", this.job));
  }

  get following() {
    const job = this.job && this.jobs.get(this.job);
    return job && isActive(job) ? job : null;
  }

  /** Show a job as it goes; its picture when it is done. Until the first preview, what was shown stays, dimmed. */
  follow(id) {
    const job = this.jobs.get(id);
    if (!isActive(job)) return this.#ended(job);
    this.job = id;
    this.#draw();
  }

  /** Show a finished picture, or that there is none. */
  show(image) {
    this.job = null;
    this.image = image;
    this.#progress(null);
    if (image) this.#frame(image.url, image.width, image.height, image.prompt || "Picture without a prompt", true);
    else this.#empty();
    this.#details(image);
    this.#tell("shown", image);
  }

  #draw() {
    const job = this.following;
    if (!job) return;
    this.#progress(job);
    this.#details(null);
    const preview = this.jobs.previews.get(job.id);
    if (preview) this.#frame(preview.image, job.request.width, job.request.height, "Preview of the picture", false);
    else this.#dim(job.request);
  }

  #ended(job) {
    this.show(job.state === "done" ? (job.images[0] ?? this.image) : this.image);
    this.#tell("ended", job);
  }

  /** One <img> lives on, so that previews follow each other without a flash. */
  #frame(src, width, height, alt, isFinished) {
    let button = $("frame").querySelector("button.picture");
    if (!button) {
      button = el("button", { type: "button", class: "picture", onclick: () => this.image && !this.following && this.#tell("view", this.image) }, el("img"));
      $("frame").replaceChildren(button);
    }
    const img = button.firstChild;
    if (img.getAttribute("src") !== src) img.src = src;
    img.alt = alt;
    shape(button, width, height);
    button.classList.remove("dim");
    button.disabled = !isFinished;
    button.title = isFinished ? "Full view" : "";
  }

  #dim({ width, height }) {
    const shown = $("frame").querySelector(".picture");
    if (shown) return shown.classList.add("dim");
    const blank = el("div", { class: "picture blank" });
    shape(blank, width, height);
    $("frame").replaceChildren(blank);
  }

  #empty() {
    const hint = el("div", { class: "empty", id: "empty" }, icon("image"), el("p", {}, "Describe a picture and press Render."));
    $("frame").replaceChildren(hint);
    this.#tell("empty", hint);
  }

  #progress(job) {
    $("progress").hidden = !job;
    $("stage").classList.toggle("busy", Boolean(job));
    if (!job) return;
    $("progress-text").textContent = described(job);
    if (job.state === "queued") $("progress-bar").removeAttribute("value");
    else $("progress-bar").value = fraction(job);
  }

  #details(image) {
    $("details").hidden = !image;
    $("details").replaceChildren(...(image ? this.#told(image) : []));
  }

  #told(image) {
    const prompt = el("p", { class: "caption", title: image.prompt }, image.prompt || "No prompt");
    return [prompt, el("p", { class: "quiet facts" }, factsOf(image).join(" · ")), this.#actions(image)];
  }

  #actions(image) {
    const act = (name) => () => this.#tell(name, image);
    const download = el("a", { class: "tool", href: image.url, download: `${image.id}.png`, "aria-label": "Download", title: "Download" }, icon("download"));
    const use = el("button", { type: "button", class: "chip", onclick: act("use"), title: "Put the settings of this picture into the form" }, icon("settings"), el("span", {}, "Use settings"));
    const start = el("button", { type: "button", class: "chip", onclick: act("start"), title: "Start the next render from this picture" }, icon("image"), el("span", {}, "Start from it"));
    const tools = [tool("compare", "Compare with another picture", act("compare")), tool("full", "Full view", act("view")), download, tool("delete", "Delete", act("delete"))];
    return el("div", { class: "actions" }, use, start, ...tools);
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

/** The facts of a picture that people look for. */
export function factsOf({ width, height, seed, settings, created }) {
  const { steps, guidance } = settings?.request ?? {};
  const took = settings?.seconds && seconds(settings.seconds);
  const when = dated(new Date(Number(created) * 1000));
  return [`${width} × ${height}`, `seed ${seed}`, steps && `${steps} steps`, guidance && `guidance ${guidance}`, took, when].filter(Boolean);
}

/** The time of today's, the day of others. */
function dated(date) {
  const isToday = date.toDateString() === new Date().toDateString();
  return isToday ? date.toLocaleTimeString([], { timeStyle: "short" }) : date.toLocaleDateString([], { dateStyle: "medium" });
}
