// Blind votes: two pictures of which the page knows no more than their sides, and what all votes say.
import { $, closable, el, shape } from "./dom.js";
import { drawPair, sideOf, vote, votes } from "./source.js";
import { toast } from "./toast.js";

const KEYS = { ArrowLeft: "left", ArrowDown: "tie", ArrowRight: "right" };

export class Votes {
  #pair = null;

  constructor() {
    closable($("vote"));
    closable($("standings"));
    $("open-votes").addEventListener("click", () => this.#open());
    $("open-standings").addEventListener("click", () => this.#standings());
    $("vote-axis").addEventListener("change", () => this.#next());
    for (const button of $("vote").querySelectorAll("[data-choice]")) button.addEventListener("click", () => this.#cast(button.dataset.choice));
    $("vote").addEventListener("keydown", (event) => event.target.id !== "vote-axis" && KEYS[event.key] && this.#cast(KEYS[event.key]));
  }

  /** The axes on which pictures may differ; settings first. */
  fill({ axes }) {
    const chosen = $("vote-axis").value;
    $("vote-axis").replaceChildren(...Object.keys(axes).filter((name) => name !== "prompt").map((name) => el("option", { selected: name === chosen }, name)));
  }

  #open() {
    $("vote").showModal();
    $("vote").querySelector("[data-choice=tie]").focus();
    this.#next();
  }

  async #next() {
    this.#pair = null;
    $("vote-pair").replaceChildren();
    try {
      this.#pair = await drawPair($("vote-axis").value);
    } catch (error) {
      $("vote-prompt").textContent = error.message;
      return;
    }
    const { prompt, shared, votes: count } = this.#pair;
    $("vote-prompt").textContent = [prompt, shared].filter(Boolean).join(" — ");
    $("vote-count").textContent = counted(count);
    $("vote-pair").replaceChildren(this.#side("left", 0), this.#side("right", 1));
  }

  #side(side, index) {
    const { token, sizes } = this.#pair;
    const image = el("img", { src: sideOf(token, side), alt: `${side} picture`, class: sizes[index][0] < 512 ? "pixels" : null });
    shape(image, ...sizes[index]);
    return el("button", { type: "button", class: "vote-side", "aria-label": `The ${side} one is better`, onclick: () => this.#cast(side) }, image);
  }

  /** One vote per pair, however often a key is pressed. */
  async #cast(choice) {
    const pair = this.#pair;
    if (!pair) return;
    this.#pair = null;
    try {
      await vote(pair.token, choice);
    } catch (error) {
      toast(error.message, { isFault: true });
    }
    if ($("vote").open) this.#next();
  }

  async #standings() {
    const known = await votes();
    const tables = Object.entries(known.standings).filter(([, rows]) => rows.length).map(([axis, rows]) => table(axis, rows));
    const note = el("p", { class: "quiet" }, `${counted(known.votes)}. A tie is half a win; the bar is the 95 % interval of the share.${known.unread ? ` ${known.unread} lines cannot be read.` : ""}`);
    $("standings-body").replaceChildren(note, ...tables);
    $("standings").showModal();
  }
}

function table(axis, rows) {
  const head = ["", "votes", "won", "tied", "lost", "share"].map((text) => el("th", { scope: "col" }, text));
  const body = rows.map((row) => el("tr", {}, el("th", { scope: "row" }, row.value), ...[row.votes, row.wins, row.ties, row.losses].map((n) => el("td", {}, String(n))), share(row)));
  return el("table", {}, el("caption", {}, axis), el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
}

function share({ share: value, low, high }) {
  const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("i"), el("b"));
  for (const [name, part] of Object.entries({ low, high, share: value })) bar.style.setProperty(`--${name}`, percent(part));
  return el("td", { class: "share", title: `${percent(low)} to ${percent(high)}` }, percent(value), bar);
}

const percent = (part) => `${Math.round(part * 100)}%`;

const counted = (count) => (count === 1 ? "1 vote" : `${count} votes`);
