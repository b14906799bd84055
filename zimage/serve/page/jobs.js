// The jobs that the server has, kept up to date by its events. Queue and picture listen to "change".
import * as api from "./api.js";

export class Jobs extends EventTarget {
  #jobs = new Map();
  previews = new Map(); // id → {index, image}

  get(id) {
    return this.#jobs.get(id);
  }

  /** Running ones first, then waiting ones in their order. */
  get active() {
    const rank = (job) => (job.state === "running" ? -1 : (job.position ?? Infinity));
    return [...this.#jobs.values()].filter(isActive).sort((a, b) => rank(a) - rank(b));
  }

  put(job) {
    this.#jobs.set(job.id, job);
    this.#tell("change", job);
  }

  /** Take what a submission answered, unless events have already told more; the job as it is known now. */
  meet(job) {
    if (!this.#jobs.has(job.id)) this.put(job);
    return this.get(job.id);
  }

  /** What the server has now; a job that it no longer names has ended unseen. */
  async load() {
    const { jobs } = await api.jobs();
    const unseen = this.active.filter(({ id }) => !jobs.some((job) => job.id === id));
    for (const job of jobs) this.put(job);
    for (const { id } of unseen) this.#whole("end", await api.job(id));
  }

  /** Take an event of the server. */
  take(name, data) {
    if (name === "history") this.#tell("history", data);
    else if (name === "job" || name === "end") this.#whole(name, data);
    else if (this.#jobs.has(data.job)) this.#part(name, data);
  }

  #whole(name, job) {
    if (!isActive(job)) this.previews.delete(job.id);
    this.put(job);
    if (name === "end") this.#tell("end", job);
  }

  #part(name, { job: id, ...data }) {
    const job = this.#jobs.get(id);
    if (name === "preview") this.previews.set(id, data);
    else if (name === "image") this.#image(job, data.image);
    else this.#jobs.set(id, { ...job, ...data });
    this.#tell("change", this.#jobs.get(id));
  }

  #image(job, image) {
    const images = [...job.images.filter(({ id }) => id !== image.id), image];
    this.#jobs.set(job.id, { ...job, images });
    this.#tell("image", image);
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

export const isActive = (job) => job.state === "queued" || job.state === "running";

/** How far a job is, from 0 to 1, over all its pictures. */
export function fraction({ count, index, step, total }) {
  return total ? (index + step / total) / Math.max(count, 1) : 0;
}

const STAGES = { encode: "Reading the prompt", refine: "Reading the prompt", denoise: "Drawing", decode: "Decoding" };

/** What a job is doing, in a line. */
export function described(job) {
  if (job.state === "queued") return job.position ? `Waiting, ${job.position} before it` : "Waiting, next in line";
  const picture = job.count > 1 ? `picture ${Math.min(job.index + 1, job.count)} of ${job.count}` : "";
  const step = job.stage === "denoise" && job.total ? `step ${job.step} of ${job.total}` : "";
  const left = job.remaining ? `${seconds(job.remaining)} left` : "";
  return [STAGES[job.stage] ?? "Starting", picture, step, left].filter(Boolean).join(" · ");
}

export function seconds(value) {
  if (value < 10) return `${Math.max(value, 0.1).toFixed(1)} s`;
  const whole = Math.round(value);
  return whole < 90 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}
