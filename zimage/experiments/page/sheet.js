// The grid: a table per page, a button per cell. Pictures are asked for shortly before they come into view, and not as
// far ahead as browsers do for loading="lazy", which would be most of them.
import { $, el, shape } from "./dom.js";
import { thumbnail } from "./source.js";

const AHEAD = "240px";

const inView = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    inView.unobserve(target);
    target.firstChild.src = thumbnail(target.dataset.id);
  }
}, { rootMargin: AHEAD });

/** Draw all pages; `chosen(id)` hears of a click on a cell with a picture or a fault. */
export function drawSheet({ pages, cells }, chosen) {
  $("pages").replaceChildren(...pages.map((page) => section(page, cells, largest(cells), chosen)));
}

/** The ids of all cells in the order in which they stand. */
export const inOrder = ({ pages }) => pages.flatMap(({ places }) => places.flat()).filter(Boolean);

function section({ title, rows, columns, places }, cells, size, chosen) {
  const head = el("tr", {}, el("td"), ...columns.map((text) => el("th", { scope: "col" }, el("span", { title: text }, text))));
  const body = places.map((ids, row) => {
    const heading = el("th", { scope: "row" }, el("span", { title: rows[row] }, rows[row]));
    return el("tr", {}, heading, ...ids.map((id) => el("td", {}, ...place(cells[id], size, chosen))));
  });
  const table = el("table", {}, el("thead", {}, head), el("tbody", {}, ...body));
  return el("section", { class: "page" }, title ? el("h2", {}, title) : null, table);
}

function place(cell, size, chosen) {
  const node = cell ? button(cell, chosen) : el("div", { class: "place none faulty" }, "no such cell");
  shape(node, ...size);
  const facts = cell?.facts.join(" · ");
  return facts ? [node, el("p", { class: "facts", title: facts }, facts)] : [node];
}

function button(cell, chosen) {
  const name = [cell.label, cell.prompt, cell.fault].filter(Boolean).join(", ");
  const attributes = { type: "button", "data-id": cell.id, "aria-label": name, title: cell.label, onclick: () => chosen(cell.id) };
  if (cell.fault) return el("button", { ...attributes, class: "place faulty" }, cell.fault);
  const node = el("button", { ...attributes, class: "place" }, el("img", { decoding: "async", alt: "" }));
  inView.observe(node);
  return node;
}

/** A shape that holds every picture, as sheets of paper have it. */
function largest(cells) {
  const all = Object.values(cells);
  return [Math.max(1, ...all.map(({ width }) => width)), Math.max(1, ...all.map(({ height }) => height))];
}
