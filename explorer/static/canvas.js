// Draws a laid-out graph on a canvas and follows the pointer, fingers and keys. 50,000 links cannot be stroked in
// every frame: a worker strokes them into a picture that is larger than the canvas, and a frame only copies that
// picture. Marks, labels and the links of one mark are drawn each time.
import { EMBEDDING, ERROR, FEATURE, LOGIT, grid, of } from "./circuit.js";

const FONT = "system-ui, 'DejaVu Sans', sans-serif";
const LEFT = 44, RIGHT = 12, TOP = 14;
const NEAR = 14; // pixels within which a mark is under the pointer
const BEYOND = 0.25; // how far the picture of links reaches beyond each side of the canvas, in its sizes
const GROUP = 4; // beside the kinds of nodes
const CURVES = 24, LINES = 160; // links of one mark, on each side, that are drawn over the others
const LABELS = 26;

/** Text as it can be seen on one line; control and direction characters would reorder what is beside them. @param {string} text @param {number} most */
export function plain(text, most) {
  const seen = text.slice(0, 400).replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, "�");
  return seen.length > most ? `${seen.slice(0, most - 1)}…` : seen;
}

/** @typedef {{marks: import("./circuit.js").Mark[], rows: number[], left: Float64Array, bottom: Float64Array, width: number, height: number, owner: Int32Array}} Layout */
/** @typedef {{source: Uint32Array, target: Uint32Array, effect: Float64Array, influence: Float64Array, into: import("./circuit.js").Lists, outOf: import("./circuit.js").Lists}} Links */
/** @typedef {{label: string, tokens: string[], says: (mark: number) => string, rowName: (layer: number) => string, over: (mark: number, x: number, y: number) => void, pick: (mark: number, more: boolean) => void, moved: (view: string) => void}} Hooks */

/** @param {Hooks} hooks */
export function chart(hooks) {
  const canvas = document.createElement("canvas"), context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", hooks.label);
  /** @type {Layout} */ let at;
  /** @type {Links} */ let links;
  /** @type {ReturnType<typeof grid>} */ let find = () => -1;
  let width = 0, height = 0, dots = 1, foot = 60;
  // A world point (x, y) is shown at (x * zoom * kx + dx, dy - y * zoom * ky).
  let kx = 1, ky = 1, zoom = 1, dx = 0, dy = 0, fitted = true;
  let hovered = -1, pinned = -1, queued = false;
  /** @type {Set<number>} */ let chosen = new Set();
  /** @type {Record<string, string>} */ let ink = {};
  /** The links as they were stroked last. @type {{image: ImageBitmap, zoom: number, dx: number, dy: number}|null} */ let picture = null;
  /** What was asked of the worker last. @type {{id: number, zoom: number, dx: number, dy: number, done: boolean}} */ let asked = { id: 0, zoom: 0, dx: 0, dy: 0, done: true };
  // All marks of the same view: 2,000 are too many to copy one by one in every frame.
  const field = document.createElement("canvas");
  let fieldAt = { zoom: 0, dx: 0, dy: 0 };
  const worker = new Worker("/strokes.js", { type: "module" });
  /** @type {Map<string, HTMLCanvasElement>} */ const stamps = new Map();
  /** What labels say, found once per focus. @type {{focus: number, list: [number, string, number][]}|null} */ let labels = null;

  const sx = (/** @type {number} */ x) => x * zoom * kx + dx;
  const sy = (/** @type {number} */ y) => dy - y * zoom * ky;
  const size = (/** @type {number} */ r) => Math.max(2.6, r * Math.min(16, 0.95 * zoom * Math.min(kx, ky)));
  const redraw = () => { if (!queued) { queued = true; requestAnimationFrame(frame); } };

  function colours() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["ink", "soft", "line", "card", "wash", "dot", "cold-line", "accent"]) ink[name] = style.getPropertyValue(`--${name}`).trim();
    stamps.clear();
  }

  function fit() {
    zoom = 1;
    kx = (width - LEFT - RIGHT) / at.width;
    ky = (height - TOP - foot) / at.height;
    dx = LEFT;
    dy = height - foot;
    fitted = true;
  }

  /** Keep some of the graph on the canvas, whatever the zoom. */
  function bound() {
    const w = at.width * zoom * kx, h = at.height * zoom * ky;
    dx = Math.min(width * 0.6, Math.max(width * 0.4 - w, dx));
    dy = Math.max(height * 0.4, Math.min(height * 0.6 + h, dy));
  }

  // ---- the picture of all links ------------------------------------------------------------------

  function paintMarks() {
    fieldAt = { zoom, dx, dy };
    field.width = Math.max(1, Math.round(width * (1 + 2 * BEYOND) * dots)); // which clears it
    field.height = Math.max(1, Math.round(height * (1 + 2 * BEYOND) * dots));
    const pen = /** @type {CanvasRenderingContext2D} */ (field.getContext("2d"));
    pen.setTransform(dots, 0, 0, dots, width * BEYOND * dots, height * BEYOND * dots);
    for (let m = 0; m < at.marks.length; m++) drawMark(pen, m);
  }

  /** Copy a picture that was made for another view to where it belongs now. @param {CanvasRenderingContext2D} pen @param {CanvasImageSource} image @param {{zoom: number, dx: number, dy: number}} then */
  function copy(pen, image, then) {
    const scale = zoom / then.zoom;
    // On whole pixels a picture is copied as it is; between them every pixel would be mixed of four.
    const whole = (/** @type {number} */ value) => (scale === 1 ? Math.round(value * dots) / dots : value);
    // Coarse while it is scaled, which lasts until the view rests.
    pen.imageSmoothingEnabled = scale === 1;
    pen.drawImage(image, whole((-width * BEYOND - then.dx) * scale + dx), whole((-height * BEYOND - then.dy) * scale + dy), width * (1 + 2 * BEYOND) * scale, height * (1 + 2 * BEYOND) * scale);
    pen.imageSmoothingEnabled = true;
  }

  /** Ask for a picture of the view. @param {boolean} changed whether the links themselves are others */
  function paintLinks(changed) {
    asked = { id: asked.id + 1, zoom, dx, dy, done: false };
    paintMarks();
    canvas.removeAttribute("data-drawn");
    worker.postMessage({
      id: asked.id, width: Math.round(width * (1 + 2 * BEYOND)), height: Math.round(height * (1 + 2 * BEYOND)), dots,
      ax: zoom * kx, ay: zoom * ky, dx: dx + width * BEYOND, dy: dy + height * BEYOND, raises: ink.dot, lowers: ink["cold-line"],
      ...(changed ? { content: { x: Float64Array.from(at.marks, (mark) => mark.x), y: Float64Array.from(at.marks, (mark) => mark.y), source: links.source, target: links.target, effect: links.effect, influence: links.influence } } : {}),
    });
    redraw();
  }
  worker.addEventListener("message", ({ data }) => {
    // Of an older question: what it shows may no longer be there.
    if (data.id !== asked.id) return data.image.close();
    picture?.image.close();
    picture = { image: data.image, zoom: asked.zoom, dx: asked.dx, dy: asked.dy };
    asked.done = data.whole;
    canvas.toggleAttribute("data-drawn", data.whole);
    redraw();
    if (data.whole) refresh();
  });

  const reaches = (/** @type {{dx: number, dy: number}} */ then) => Math.abs(then.dx - dx) < width * BEYOND && Math.abs(then.dy - dy) < height * BEYOND;
  /** Ask anew if the picture is of another zoom, or does not reach as far as the view. */
  function refresh() {
    // One that is being stroked is finished first, or a view that moves on and on would never get any.
    if (asked.done && (asked.zoom !== zoom || !reaches(asked))) paintLinks(false);
    else if (fieldAt.zoom !== zoom || !reaches(fieldAt)) { paintMarks(); redraw(); }
  }

  // ---- a frame -----------------------------------------------------------------------------------

  function frame() {
    queued = false;
    if (!width || !at) return;
    const pen = context;
    pen.setTransform(dots, 0, 0, dots, 0, 0);
    pen.globalAlpha = 1;
    pen.fillStyle = ink.card;
    pen.fillRect(0, 0, width, height);
    drawBands(pen);
    const focus = hovered >= 0 ? hovered : pinned;
    pen.globalAlpha = focus >= 0 ? 0.22 : 1;
    if (picture) copy(pen, picture.image, picture);
    pen.globalAlpha = 1;
    const near = focus >= 0 ? drawLinksOf(pen, focus) : null;
    pen.globalAlpha = near ? 0.32 : 1;
    copy(pen, field, fieldAt);
    pen.globalAlpha = 1;
    if (near) for (const m of near) drawMark(pen, m);
    if (focus >= 0) ring(pen, focus, ink.ink, 2);
    if (pinned >= 0) ring(pen, pinned, ink.accent, 3);
    for (const mark of chosen) ring(pen, mark, ink.accent, 1.5);
    drawLabels(pen, near, focus);
    drawAxes(pen);
  }

  function drawBands(/** @type {CanvasRenderingContext2D} */ pen) {
    pen.fillStyle = ink.wash;
    for (let i = 0; i < at.left.length - 1; i += 2) pen.fillRect(sx(at.left[i]), 0, (at.left[i + 1] - at.left[i]) * zoom * kx, height - foot);
    pen.fillStyle = ink.line;
    for (let i = 1; i < at.rows.length; i++) pen.fillRect(LEFT, Math.round(sy(at.bottom[i])), width - LEFT, 1);
  }

  /** The links of a mark, as curves over all others. Returns the marks at their other ends. */
  function drawLinksOf(/** @type {CanvasRenderingContext2D} */ pen, /** @type {number} */ mark) {
    const near = new Set([mark]);
    for (const [list, ends] of /** @type {[Uint32Array, Uint32Array][]} */ ([[of(links.into, mark), links.source], [of(links.outOf, mark), links.target]])) {
      if (!list.length) continue;
      const most = links.influence[list[0]] || 1;
      // Lists are in the order of the links, the most influential first. The weaker ones are straight hairlines:
      // a wide dashed curve costs many times as much, and a mark may have a thousand links.
      pen.setLineDash([]);
      pen.lineWidth = 0.8;
      pen.globalAlpha = 0.25;
      for (const lowers of [false, true]) {
        pen.beginPath();
        for (const e of list.subarray(CURVES, LINES)) {
          if (links.effect[e] < 0 !== lowers) continue;
          near.add(ends[e]);
          pen.moveTo(sx(at.marks[links.source[e]].x), sy(at.marks[links.source[e]].y));
          pen.lineTo(sx(at.marks[links.target[e]].x), sy(at.marks[links.target[e]].y));
        }
        pen.strokeStyle = lowers ? ink["cold-line"] : ink.dot;
        pen.stroke();
      }
      for (const e of [...list.subarray(0, CURVES)].reverse()) { // drawn last, the strongest are on top
        near.add(ends[e]);
        const a = at.marks[links.source[e]], b = at.marks[links.target[e]], strength = Math.sqrt(links.influence[e] / most);
        const [x0, y0, x1, y1] = [sx(a.x), sy(a.y), sx(b.x), sy(b.y)], bend = (y0 - y1) * 0.45;
        pen.beginPath();
        pen.moveTo(x0, y0);
        pen.bezierCurveTo(x0, y0 - bend, x1, y1 + bend, x1, y1);
        pen.setLineDash(links.effect[e] < 0 ? [5, 4] : []);
        pen.strokeStyle = links.effect[e] < 0 ? ink["cold-line"] : ink.dot;
        pen.globalAlpha = 0.15 + 0.8 * strength;
        pen.lineWidth = 0.8 + 3.4 * strength;
        pen.stroke();
      }
    }
    pen.setLineDash([]);
    pen.globalAlpha = 1;
    return near;
  }

  const visible = (/** @type {number} */ x, /** @type {number} */ y) => x > LEFT - 20 && x < width + 20 && y > -20 && y < height - foot + 12;

  function drawMark(/** @type {CanvasRenderingContext2D} */ pen, /** @type {number} */ m) {
    const mark = at.marks[m], x = sx(mark.x), y = sy(mark.y), image = stamp(mark.name === null ? mark.kind : GROUP, size(mark.r));
    pen.drawImage(image, x - image.width / dots / 2, y - image.height / dots / 2, image.width / dots, image.height / dots);
  }

  /** A mark as a picture: copying 2,000 of them takes a fifth of the time of filling 2,000 paths. */
  function stamp(/** @type {number} */ kind, /** @type {number} */ radius) {
    const r = kind === GROUP ? Math.max(6, radius * 1.15) : Math.round(radius * 4) / 4, name = `${kind} ${r}`;
    let image = stamps.get(name);
    if (image) return image;
    image = document.createElement("canvas");
    image.width = image.height = Math.ceil((2.8 * r + 6) * dots);
    const pen = /** @type {CanvasRenderingContext2D} */ (image.getContext("2d")), middle = image.width / dots / 2;
    pen.scale(dots, dots);
    pen.beginPath();
    shape(pen, kind, middle, middle, r);
    // An outline in the colour of the card keeps touching marks apart.
    pen.lineWidth = kind === ERROR ? 1.4 : kind === GROUP ? 1.8 : 1;
    pen.strokeStyle = kind === ERROR ? ink.soft : kind === GROUP ? ink.ink : ink.card;
    pen.fillStyle = kind === ERROR ? ink.card : kind === EMBEDDING ? ink["cold-line"] : kind === LOGIT ? ink.ink : ink.dot;
    pen.fill();
    pen.stroke();
    stamps.set(name, image);
    return image;
  }

  function ring(/** @type {CanvasRenderingContext2D} */ pen, /** @type {number} */ m, /** @type {string} */ colour, /** @type {number} */ wide) {
    const mark = at.marks[m];
    pen.beginPath();
    pen.arc(sx(mark.x), sy(mark.y), Math.max(6, size(mark.r)) + 4, 0, 7);
    pen.strokeStyle = colour;
    pen.lineWidth = wide;
    pen.stroke();
  }

  /** Names of the groups, the logits and the most influential marks, as far as they do not overlap. */
  function drawLabels(/** @type {CanvasRenderingContext2D} */ pen, /** @type {Set<number>|null} */ near, /** @type {number} */ focus) {
    pen.font = `11.5px ${FONT}`;
    pen.textBaseline = "middle";
    pen.textAlign = "left";
    if (labels?.focus !== focus) labels = { focus, list: wanted(pen, near, focus) };
    /** @type {[number, number, number][]} */ const taken = [];
    for (const [m, text, wide] of labels.list) {
      const mark = at.marks[m], r = Math.max(5, size(mark.r)) + 4, y = sy(mark.y);
      const x = sx(mark.x) + r + wide < width - 4 ? sx(mark.x) + r : sx(mark.x) - r - wide;
      if (taken.length >= LABELS || !visible(sx(mark.x), y) || taken.some(([ox, oy, ow]) => Math.abs(oy - y) < 14 && x < ox + ow + 4 && ox < x + wide + 4)) continue;
      taken.push([x, y, wide]);
      pen.fillStyle = ink.card;
      pen.globalAlpha = 0.8;
      pen.fillRect(x - 2, y - 7.5, wide + 4, 15);
      pen.globalAlpha = 1;
      pen.fillStyle = ink.ink;
      pen.fillText(text, x, y + 0.5);
    }
  }

  /** Marks that get a label if there is room, with their words and the words' width, the most important first. */
  function wanted(/** @type {CanvasRenderingContext2D} */ pen, /** @type {Set<number>|null} */ near, /** @type {number} */ focus) {
    const first = (/** @type {number} */ m) => (m === focus ? 3 : at.marks[m].name !== null ? 2 : at.marks[m].kind === LOGIT ? 1 : 0);
    /** @type {[number, string, number][]} */ const list = [];
    const order = [...(near ?? at.marks.keys())].filter((m) => at.marks[m].kind !== EMBEDDING).sort((a, b) => first(b) - first(a) || at.marks[b].influence - at.marks[a].influence);
    for (const m of order) {
      const text = plain(hooks.says(m), 26);
      if (text) list.push([m, text, pen.measureText(text).width]);
      if (list.length >= 8 * LABELS) break;
    }
    return list;
  }

  function drawAxes(/** @type {CanvasRenderingContext2D} */ pen) {
    pen.fillStyle = ink.card;
    pen.fillRect(0, height - foot, width, foot);
    pen.fillRect(0, 0, LEFT - 4, height);
    pen.fillStyle = ink.line;
    pen.fillRect(LEFT - 4, height - foot, width, 1);
    pen.fillStyle = ink.soft;
    pen.font = `11px ${FONT}`;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    let last = Infinity;
    for (let i = 0; i < at.rows.length; i++) {
      const y = sy((at.bottom[i] + at.bottom[i + 1]) / 2);
      if (y > height - foot - 2 || y < 6 || last - y < 13) continue;
      last = y;
      pen.fillText(hooks.rowName(at.rows[i]), LEFT - 9, y);
    }
    pen.fillStyle = ink.ink;
    pen.font = `12px ui-monospace, "DejaVu Sans Mono", monospace`;
    let ended = LEFT - 6;
    for (let i = 0; i < hooks.tokens.length; i++) {
      const x = sx((at.left[i] + at.left[i + 1]) / 2), y = height - foot + 9;
      if (x < ended || x > width - 2) continue;
      ended = x + 15; // one line's height, since the words are turned
      pen.save();
      pen.translate(x + 4, y);
      pen.rotate(-Math.PI / 4);
      pen.fillText(plain(hooks.tokens[i].trim() || hooks.tokens[i], 12), 0, 0);
      pen.restore();
    }
  }

  // ---- pointer, fingers, keys --------------------------------------------------------------------

  function scaleAt(/** @type {number} */ by, /** @type {number} */ x, /** @type {number} */ y) {
    const next = Math.min(60, Math.max(0.6, zoom * by)), ratio = next / zoom;
    dx = x - (x - dx) * ratio;
    dy = y - (y - dy) * ratio;
    zoom = next;
    settle();
  }

  let resting = 0;
  function settle() {
    fitted = false;
    bound();
    redraw();
    if (fieldAt.zoom === zoom && !reaches(fieldAt)) refresh();
    // After a change of scale all is drawn anew once the view rests; until then the pictures are scaled.
    clearTimeout(resting);
    resting = window.setTimeout(() => { refresh(); hooks.moved(here()); }, 150);
  }

  /** The view as text, for the address: zoom and the world's point in the middle. */
  const here = () => (fitted ? "" : [zoom, (width / 2 - dx) / (zoom * kx * at.width), (dy - height / 2) / (zoom * ky * at.height)].map((each) => each.toFixed(3)).join(","));
  function look(/** @type {string} */ text) {
    const [z, x, y] = text.split(",").map(Number);
    if (!(z >= 0.6 && z <= 60) || !Number.isFinite(x) || !Number.isFinite(y)) return;
    zoom = z;
    dx = width / 2 - x * at.width * zoom * kx;
    dy = height / 2 + y * at.height * zoom * ky;
    fitted = false;
    bound();
  }

  const under = (/** @type {PointerEvent|MouseEvent} */ event) => {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    if (x < LEFT || y > height - foot + 10) return -1;
    return find((x - dx) / (zoom * kx), (dy - y) / (zoom * ky), NEAR, zoom * kx, zoom * ky);
  };
  function hover(/** @type {number} */ mark, x = 0, y = 0) {
    if (mark !== hovered) { hovered = mark; redraw(); }
    canvas.style.cursor = mark >= 0 ? "pointer" : "grab";
    hooks.over(mark, x, y);
  }

  /** @type {Map<number, {x: number, y: number}>} */ const fingers = new Map();
  let travelled = 0;
  canvas.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (fingers.size === 1) travelled = 0;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) { hover(under(event), event.clientX, event.clientY); return; }
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    travelled += Math.hypot(event.clientX - before.x, event.clientY - before.y);
    if (other) {
      const box = canvas.getBoundingClientRect(), far = (/** @type {{x: number, y: number}} */ one) => Math.max(8, Math.hypot(one.x - other.x, one.y - other.y));
      scaleAt(far({ x: event.clientX, y: event.clientY }) / far(before), (event.clientX + other.x) / 2 - box.left, (event.clientY + other.y) / 2 - box.top);
    } else if (travelled > 4) {
      dx += event.clientX - before.x;
      dy += event.clientY - before.y;
      settle();
    }
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  const lift = (/** @type {PointerEvent} */ event) => {
    const held = fingers.delete(event.pointerId);
    if (held && event.type === "pointerup" && travelled <= 4) hooks.pick(under(event), event.shiftKey);
  };
  canvas.addEventListener("pointerup", lift);
  canvas.addEventListener("pointercancel", lift);
  canvas.addEventListener("pointerleave", () => { if (!fingers.size) hover(-1); });
  canvas.addEventListener("wheel", (event) => {
    // The wheel alone scrolls the page, as everywhere; a pinch on a trackpad arrives as a wheel with Ctrl.
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    scaleAt(Math.exp(-event.deltaY / 250), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });

  /** The mark that a key leads to: the nearest one in its direction. */
  function beside(/** @type {number} */ from, /** @type {number} */ right, /** @type {number} */ up) {
    if (from < 0) return at.marks.reduce((best, mark, m) => (best < 0 || mark.influence > at.marks[best].influence ? m : best), -1);
    let best = -1, least = Infinity;
    const here = at.marks[from];
    for (let m = 0; m < at.marks.length; m++) {
      const x = at.marks[m].x - here.x, y = at.marks[m].y - here.y, ahead = right * x + up * y, aside = Math.abs(up * x) + Math.abs(right * y);
      if (m === from || ahead < 0.4) continue;
      const far = ahead + 2.5 * aside;
      if (far < least) { least = far; best = m; }
    }
    return best < 0 ? from : best;
  }
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !at) return;
    /** @type {Record<string, [number, number]>} */ const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    const way = ways[event.key], pan = 60;
    if (way && event.shiftKey) { dx -= way[0] * pan; dy += way[1] * pan; settle(); }
    else if (way) {
      const mark = beside(hovered >= 0 ? hovered : pinned, ...way);
      if (mark < 0) return;
      const [x, y] = [sx(at.marks[mark].x), sy(at.marks[mark].y)], box = canvas.getBoundingClientRect();
      if (x < LEFT + 10 || x > width - 20 || y < 20 || y > height - foot - 10) { dx += width / 2 - x; dy += height / 2 - y; settle(); }
      hover(mark, box.left + sx(at.marks[mark].x), box.top + sy(at.marks[mark].y));
    } else if (event.key === "Enter" || event.key === " ") { if (hovered >= 0) hooks.pick(hovered, event.key === " "); }
    else if (event.key === "+" || event.key === "=") scaleAt(1.3, width / 2, height / 2);
    else if (event.key === "-") scaleAt(1 / 1.3, width / 2, height / 2);
    else if (event.key === "0") api.fit();
    else if (event.key === "Escape") { hover(-1); hooks.pick(-1, false); }
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("blur", () => hover(-1));

  function resize() {
    const box = canvas.getBoundingClientRect();
    if (!box.width || (box.width === width && box.height === height)) return;
    const view = at && !fitted ? here() : "";
    width = box.width;
    height = box.height;
    dots = Math.min(2, devicePixelRatio || 1);
    stamps.clear();
    canvas.width = Math.round(width * dots);
    canvas.height = Math.round(height * dots);
    foot = 66;
    if (!at) return;
    fit();
    if (view) look(view);
    paintLinks(true);
  }
  // A canvas that leaves the page loses its size, which is noticed here.
  new ResizeObserver(() => (canvas.isConnected ? resize() : worker.terminate())).observe(canvas);
  const themed = () => {
    if (!canvas.isConnected) return removeEventListener("winnow-theme", themed);
    colours();
    if (at) paintLinks(true);
  };
  addEventListener("winnow-theme", themed);
  colours();

  const api = {
    canvas,
    /** Show another layout. @param {Layout} layout @param {Links} joined @param {string} [view] */
    show(layout, joined, view) {
      at = layout;
      links = joined;
      labels = null;
      find = grid(at.marks);
      hovered = -1;
      chosen = new Set();
      pinned = -1;
      if (!width) { resize(); }
      if (!width) return;
      const kept = view ?? here();
      fit();
      if (kept) look(kept);
      paintLinks(true);
    },
    /** Mark what is pinned, and what is chosen for a group. @param {number} mark @param {Set<number>} more */
    pin(mark, more) { pinned = mark; chosen = more; redraw(); },
    /** Show a mark as if the pointer were over it. @param {number} mark */
    light(mark) { if (mark !== hovered) { hovered = mark; redraw(); } },
    fit() { fit(); paintLinks(false); hooks.moved(""); },
    /** @param {number} by */
    scale(by) { scaleAt(by, width / 2, height / 2); },
    /** Where a mark is on the canvas, for tests. @param {number} mark */
    where: (mark) => [sx(at.marks[mark].x), sy(at.marks[mark].y)],
  };
  return api;
}

/** @param {CanvasRenderingContext2D} pen @param {number} kind @param {number} x @param {number} y @param {number} r */
function shape(pen, kind, x, y, r) {
  if (kind === FEATURE) { pen.moveTo(x + r, y); pen.arc(x, y, r, 0, 7); }
  else if (kind === EMBEDDING) pen.rect(x - r * 0.9, y - r * 0.9, 1.8 * r, 1.8 * r);
  else if (kind === ERROR) { const s = r * 1.25; pen.moveTo(x, y - s); pen.lineTo(x + s, y); pen.lineTo(x, y + s); pen.lineTo(x - s, y); pen.closePath(); }
  else if (kind === GROUP) pen.roundRect(x - r, y - r, 2 * r, 2 * r, r * 0.5);
  else { const s = r * 1.3; pen.moveTo(x, y - s); pen.lineTo(x + s, y + s * 0.75); pen.lineTo(x - s, y + s * 0.75); pen.closePath(); }
}
