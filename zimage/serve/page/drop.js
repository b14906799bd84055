// Pictures dropped anywhere on the page: two places appear, one to take their settings, one to start from them.
import { $ } from "./dom.js";

const holdsFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");

/** `take(target, file)`: target is "settings" or "image". */
export function acceptDrops(take) {
  const show = (event) => {
    if (!holdsFile(event)) return;
    event.preventDefault();
    $("drop").hidden = false;
    mark(event.target.closest?.(".drop-target"));
  };
  window.addEventListener("dragenter", show);
  window.addEventListener("dragover", show);
  window.addEventListener("dragleave", (event) => event.relatedTarget === null && ($("drop").hidden = true));
  window.addEventListener("drop", (event) => {
    $("drop").hidden = true;
    const [file] = event.dataTransfer?.files ?? [];
    if (!file) return;
    event.preventDefault();
    take(event.target.closest?.(".drop-target")?.dataset.target ?? "image", file);
  });
}

function mark(target) {
  for (const node of $("drop").children) node.classList.toggle("over", node === target);
}
