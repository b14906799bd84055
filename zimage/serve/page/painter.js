// The mask brush: strokes over the picture to start from. They are kept as a list, so that undo is leaving out the last.
import { $, closable } from "./dom.js";

// px of the mask's longer side: fine enough for small pictures too; the server brings it to the size of the render
const [LEAST, MOST] = [1024, 2048];
const STEP = 0.02; // of the longer side: how far an arrow key moves the brush

export class Painter {
  #strokes = []; // {kind: "paint" | "erase", size, points} | {kind: "invert" | "clear"}
  #file = null; // the picture that they belong to
  #cursor = null; // where the brush is moved by keys

  constructor(form) {
    this.form = form;
    this.canvas = $("painter-canvas");
    this.layer = document.createElement("canvas"); // the mask itself: opaque white is repainted
    closable($("painter"));
    $("open-painter").addEventListener("click", () => this.open());
    $("mask-undo").addEventListener("click", () => this.#undo());
    for (const kind of ["invert", "clear"]) $(`mask-${kind}`).addEventListener("click", () => this.#add({ kind }));
    $("mask-done").addEventListener("click", () => this.#done());
    $("painter").addEventListener("keydown", (event) => this.#key(event));
    this.#listen();
  }

  #listen() {
    this.canvas.addEventListener("pointerdown", (event) => this.#down(event));
    this.canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => (this.drawing = null));
  }

  async open() {
    const file = this.form.field("image").value;
    if (file !== this.#file) this.#strokes = [];
    this.#file = file;
    this.picture = await createImageBitmap(file);
    const longer = Math.max(this.picture.width, this.picture.height);
    const scale = Math.min(Math.max(longer, LEAST), MOST) / longer;
    for (const canvas of [this.canvas, this.layer]) {
      canvas.width = Math.max(1, Math.round(this.picture.width * scale));
      canvas.height = Math.max(1, Math.round(this.picture.height * scale));
    }
    $("painter-paper").style.setProperty("--w", this.canvas.width);
    $("painter-paper").style.setProperty("--h", this.canvas.height);
    this.#cursor = [this.canvas.width / 2, this.canvas.height / 2];
    $("painter").showModal();
    this.canvas.focus();
    this.#draw();
  }

  get #brush() {
    const longer = Math.max(this.canvas.width, this.canvas.height);
    const kind = document.querySelector("[name=brush]:checked").value;
    return { kind, size: Math.max(1, ($("brush-size").value / 100) ** 1.5 * longer * 0.6), points: [] };
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) * this.canvas.width) / box.width, ((event.clientY - box.top) * this.canvas.height) / box.height];
  }

  #down(event) {
    if (event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.drawing = { ...this.#brush, points: [this.#point(event)] };
    this.#add(this.drawing);
  }

  #move(event) {
    this.#cursor = this.#point(event);
    if (this.drawing) this.drawing.points.push(this.#cursor);
    this.#draw();
  }

  #add(stroke) {
    this.#strokes.push(stroke);
    this.#draw();
  }

  #undo() {
    this.#strokes.pop();
    this.#draw();
  }

  #key(event) {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const onCanvas = event.target === this.canvas;
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) this.#undo();
    else if (event.key === "[" || event.key === "]") this.#resize(event.key === "]" ? 4 : -4);
    else if (onCanvas && by) this.#walk(by);
    else if (onCanvas && event.key === " ") this.#add({ ...this.#brush, points: [this.#cursor] });
    else return;
    event.preventDefault();
  }

  #resize(change) {
    $("brush-size").value = Number($("brush-size").value) + change;
    this.#draw();
  }

  #walk([x, y]) {
    const step = STEP * Math.max(this.canvas.width, this.canvas.height);
    this.#cursor = [this.#cursor[0] + x * step, this.#cursor[1] + y * step];
    this.#draw();
  }

  /** The mask from its strokes, then the picture with the mask as a tint, then the brush. */
  #draw() {
    const { width, height } = this.canvas;
    const mask = this.layer.getContext("2d");
    mask.clearRect(0, 0, width, height);
    for (const stroke of this.#strokes) STROKES[stroke.kind](mask, stroke);
    const context = this.canvas.getContext("2d");
    context.globalAlpha = 1;
    context.drawImage(this.picture, 0, 0, width, height);
    context.globalAlpha = 0.55;
    context.drawImage(tinted(this.layer), 0, 0);
    context.globalAlpha = 1;
    this.#ring(context);
    $("mask-undo").disabled = this.#strokes.length === 0;
  }

  #ring(context) {
    context.lineWidth = Math.max(1, this.canvas.width / 500);
    for (const [colour, more] of [["#000", 0], ["#fff", context.lineWidth]]) {
      context.strokeStyle = colour;
      context.beginPath();
      context.arc(...this.#cursor, this.#brush.size / 2 + more, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  /** White on black, as the server takes it; a mask without any white counts as no mask. */
  async #done() {
    const { width, height } = this.layer;
    const flat = new OffscreenCanvas(width, height);
    const context = flat.getContext("2d");
    context.fillRect(0, 0, width, height);
    context.drawImage(this.layer, 0, 0);
    const isEmpty = !context.getImageData(0, 0, width, height).data.some((value, place) => place % 4 === 0 && value > 127);
    const blob = await flat.convertToBlob({ type: "image/png" });
    this.form.field("mask").set(isEmpty ? undefined : new File([blob], "mask.png", { type: "image/png" }));
    $("painter").close();
  }
}

const STROKES = { paint: stroked("source-over"), erase: stroked("destination-out"), invert: filled("xor"), clear: filled("destination-out") };

function stroked(mode) {
  return (context, { size, points }) => {
    Object.assign(context, { globalCompositeOperation: mode, strokeStyle: "#fff", lineWidth: size, lineCap: "round", lineJoin: "round" });
    context.beginPath();
    context.moveTo(...points[0]);
    for (const point of points.length > 1 ? points.slice(1) : points) context.lineTo(...point);
    context.stroke();
  };
}

function filled(mode) {
  return (context) => {
    Object.assign(context, { globalCompositeOperation: mode, fillStyle: "#fff" });
    context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  };
}

function tinted(layer) {
  const tint = new OffscreenCanvas(layer.width, layer.height);
  const context = tint.getContext("2d");
  context.drawImage(layer, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = "#2f6bff";
  context.fillRect(0, 0, layer.width, layer.height);
  return tint;
}
