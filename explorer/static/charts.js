// Two charts, drawn by hand: a histogram in SVG and a scatter of all latents on a canvas.
import { el, number, svg } from "./dom.js";

/**
 * @param {number[]} counts @param {number} low @param {number} high
 * @param {{label: string, axis?: string, other?: number[], log?: boolean, show?: (edge: number) => string}} options
 */
export function histogram(counts, low, high, options) {
  const [W, H, foot] = [360, 120, 20];
  const scale = (/** @type {number} */ count) => (options.log ? Math.log1p(count) : count);
  const show = options.show ?? number;
  const most = Math.max(1e-9, ...counts.map(scale), ...(options.other ?? []).map(scale));
  const width = W / counts.length;
  const bars = (/** @type {number[]} */ all, /** @type {string|null} */ kind) => all.map((count, i) => {
    const tall = (scale(count) / most) * (H - foot - 6);
    const edge = low + ((high - low) * i) / counts.length;
    const next = low + ((high - low) * (i + 1)) / counts.length;
    return svg("rect", { class: kind, x: i * width + 0.5, y: H - foot - tall, width: Math.max(1, width - 1), height: tall },
      svg("title", {}, `${show(edge)} to ${show(next)}: ${count.toLocaleString("en")}`));
  });
  const at = (/** @type {number} */ x, /** @type {string} */ anchor, /** @type {string} */ text) => Object.assign(svg("text", { x, y: H - 5, "text-anchor": anchor }), { textContent: text });
  return svg("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": options.label },
    ...bars(counts, null), ...(options.other ? bars(options.other, "other") : []),
    svg("line", { x1: 0, x2: W, y1: H - foot + 0.5, y2: H - foot + 0.5 }),
    at(0, "start", show(low)), at(W, "end", show(high)), at(W / 2, "middle", options.axis ?? ""));
}

/** Positions of round numbers on an axis. @param {number} low @param {number} high @param {boolean} log */
function ticks(low, high, log) {
  if (log) return Array.from({ length: 12 }, (_, i) => -i).filter((power) => power >= low && power <= high);
  const step = 10 ** Math.floor(Math.log10((high - low) / 3 || 1));
  const wide = (high - low) / step > 8 ? step * 2 : step;
  return Array.from({ length: 20 }, (_, i) => Math.ceil(low / wide) * wide + i * wide).filter((value) => value <= high);
}

/**
 * A scatter of latents: hover names them, a click opens one. The list below the map is the same for keyboards.
 * @param {{latents: number[], x: number[], y: number[]}} data
 * @param {{x: string, y: string, xLog: boolean, yLog: boolean, over: (latent: number|null, x: number, y: number) => void, open: (latent: number) => void}} options
 */
export function scatter(data, options) {
  const canvas = /** @type {HTMLCanvasElement} */ (el("canvas", { role: "img", "aria-label": `${data.latents.length} latents: ${options.x} against ${options.y}` }));
  const on = (/** @type {number[]} */ all, /** @type {boolean} */ log) => all.map((value) => (log ? (value > 0 ? Math.log10(value) : NaN) : value));
  const xs = on(data.x, options.xLog), ys = on(data.y, options.yLog);
  const range = (/** @type {number[]} */ all) => {
    let low = Infinity, high = -Infinity;
    for (const value of all) if (!Number.isNaN(value)) { low = Math.min(low, value); high = Math.max(high, value); }
    if (low > high) return [0, 1];
    const pad = (high - low || 1) * 0.04;
    return [low - pad, high + pad];
  };
  const [x0, x1] = range(xs), [y0, y1] = range(ys);
  let W = 0, H = 0;
  const left = 46, bottom = 36, top = 10, right = 10;
  const px = (/** @type {number} */ value) => left + ((value - x0) / (x1 - x0)) * (W - left - right);
  const py = (/** @type {number} */ value) => H - bottom - ((value - y0) / (y1 - y0)) * (H - bottom - top);
  const draw = (/** @type {number} */ marked = -1) => {
    const style = getComputedStyle(document.documentElement), ratio = devicePixelRatio || 1;
    W = canvas.clientWidth; H = canvas.clientHeight;
    if (!W) return;
    canvas.width = W * ratio; canvas.height = H * ratio;
    const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    pen.scale(ratio, ratio);
    pen.font = "12px system-ui, sans-serif";
    pen.strokeStyle = style.getPropertyValue("--line");
    pen.fillStyle = style.getPropertyValue("--soft");
    pen.textAlign = "center";
    for (const at of ticks(x0, x1, options.xLog)) {
      pen.beginPath(); pen.moveTo(px(at), top); pen.lineTo(px(at), H - bottom); pen.stroke();
      pen.fillText(options.xLog ? number(10 ** at) : number(Number(at.toPrecision(6))), px(at), H - bottom + 15);
    }
    pen.fillText(options.x + (options.xLog ? " (log)" : ""), left + (W - left) / 2, H - 4);
    pen.textAlign = "right";
    for (const at of ticks(y0, y1, options.yLog)) {
      pen.beginPath(); pen.moveTo(left, py(at)); pen.lineTo(W - right, py(at)); pen.stroke();
      pen.fillText(options.yLog ? number(10 ** at) : number(Number(at.toPrecision(6))), left - 6, py(at) + 4);
    }
    pen.fillStyle = style.getPropertyValue("--dot");
    const size = xs.length > 20000 ? 1.6 : xs.length > 2000 ? 2.6 : 4;
    pen.globalAlpha = xs.length > 20000 ? 0.4 : 0.55;
    for (let i = 0; i < xs.length; i++) {
      if (Number.isNaN(xs[i]) || Number.isNaN(ys[i])) continue;
      pen.beginPath(); pen.arc(px(xs[i]), py(ys[i]), size, 0, 7); pen.fill();
    }
    pen.globalAlpha = 1;
    if (marked >= 0) {
      pen.strokeStyle = style.getPropertyValue("--ink"); pen.lineWidth = 2;
      pen.beginPath(); pen.arc(px(xs[marked]), py(ys[marked]), 7, 0, 7); pen.stroke();
    }
  };
  const nearest = (/** @type {PointerEvent|MouseEvent} */ event) => {
    const box = canvas.getBoundingClientRect(), mx = event.clientX - box.left, my = event.clientY - box.top;
    let best = -1, least = 18 * 18;
    for (let i = 0; i < xs.length; i++) {
      const far = (px(xs[i]) - mx) ** 2 + (py(ys[i]) - my) ** 2;
      if (far < least) { least = far; best = i; }
    }
    return best;
  };
  let last = -1;
  canvas.addEventListener("pointermove", (event) => {
    const found = nearest(event);
    if (found !== last) { draw(found); last = found; }
    options.over(found >= 0 ? data.latents[found] : null, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", () => { last = -1; draw(); options.over(null, 0, 0); });
  canvas.addEventListener("click", (event) => { const found = nearest(event); if (found >= 0) options.open(data.latents[found]); });
  new ResizeObserver(() => draw()).observe(canvas);
  addEventListener("winnow-theme", () => draw());
  return canvas;
}
