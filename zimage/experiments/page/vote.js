// Blind votes: two pictures of which the page knows no more than their sides; what all votes say, and all scores.
import { $, closable, el, shape } from "./dom.js";
import { drawPair, isServed, ranks, sideOf, vote, votes } from "./source.js";
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
    const parts = [isServed ? byVotes(await votes()) : [], byScores(await ranks())].flat();
    $("standings-body").replaceChildren(...(parts.length ? parts : [el("p", { class: "quiet" }, "There are no scores.")]));
    $("standings").showModal();
  }
}

function byVotes({ votes: count, unread, standings }) {
  const words = `${counted(count)}. A tie is half a win; the bar is the 95 % interval of the share.`;
  const note = el("p", { class: "quiet" }, unread ? `${words} ${unread} lines cannot be read.` : words);
  const row = (one) => [one.value, ...[one.votes, one.wins, one.ties, one.losses].map((n) => el("td", {}, String(n))), share(one)];
  const tables = Object.entries(standings).filter(([, rows]) => rows.length);
  return [note, ...tables.map(([axis, rows]) => table(axis, ["votes", "won", "tied", "lost", "share"], rows.map(row)))];
}

function byScores(tables) {
  const row = ({ setting, ...figures }) => [setting, ...["mean", "rank", "best"].map((name) => el("td", {}, figures[name]))];
  const note = el("p", { class: "quiet" }, "Scores with 95 % intervals over prompts, and how often a setting is the best when prompts are drawn anew.");
  return tables.length ? [note, ...tables.map(({ title, rows }) => table(title, ["mean", "rank", "best in"], rows.map(row)))] : [];
}

function table(title, names, rows) {
  const head = ["", ...names].map((text) => el("th", { scope: "col" }, text));
  const body = rows.map(([name, ...cells]) => el("tr", {}, el("th", { scope: "row" }, name), ...cells));
  return el("table", {}, el("caption", {}, title), el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
}

function share({ share: value, low, high }) {
  const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("i"), el("b"));
  for (const [name, part] of Object.entries({ low, high, share: value })) bar.style.setProperty(`--${name}`, percent(part));
  return el("td", { class: "share", title: `${percent(low)} to ${percent(high)}` }, percent(value), bar);
}

const percent = (part) => `${Math.round(part * 100)}%`;

const counted = (count) => (count === 1 ? "1 vote" : `${count} votes`);
