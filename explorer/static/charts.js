// Two charts by uPlot: a histogram, and a scatter of all latents.
import { el, hideTip, number, showTip } from "./dom.js";

const uPlot = /** @type {any} */ (globalThis).uPlot;
const FONT = "12px system-ui, sans-serif";
/** @param {string} name */
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** An axis in the theme's colours. @param {Record<string, any>} more */
const axis = (more) => ({ stroke: colour("--soft"), font: FONT, labelFont: FONT, labelSize: 20, grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, ...more });

/**
 * A box whose chart is redrawn when its width or the theme changes.
 * @param {{kind: string, label: string, height: () => number}} how @param {(width: number, height: number) => {options: any, data: any}} make
 */
function chart(how, make) {
  const box = el("div", { class: `chart ${how.kind}`, role: "img", "aria-label": how.label });
  /** @type {any} */ let plot = null;
  const draw = () => {
    if (!box.clientWidth) return;
    plot?.destroy();
    const { options, data } = make(box.clientWidth, how.height());
    plot = new uPlot({ legend: { show: false }, ...options, width: box.clientWidth, height: how.height() }, data, box);
  };
  let width = 0;
  new ResizeObserver(() => { if (box.clientWidth !== width) { width = box.clientWidth; draw(); } }).observe(box);
  const themed = () => (box.isConnected ? draw() : removeEventListener("winnow-theme", themed));
  addEventListener("winnow-theme", themed);
  return box;
}

/**
 * @param {number[]} counts @param {number} low @param {number} high
 * @param {{label: string, axis?: string, names?: string[], other?: number[], log?: boolean, show?: (edge: number) => string}} options
 */
export function histogram(counts, low, high, options) {
  const show = options.show ?? number, wide = (high - low) / counts.length;
  const scale = (/** @type {number} */ count) => (options.log ? Math.log10(1 + count) : count);
  const all = options.other ? [counts, options.other] : [counts];
  const most = Math.max(1e-9, ...all.flat().map(scale));
  const middles = counts.map((_, i) => low + wide * (i + 0.5));
  const says = (/** @type {number} */ i) => `${show(low + wide * i)} to ${show(low + wide * (i + 1))}: ` +
    all.map((each, k) => `${options.names ? `${options.names[k]} ` : ""}${each[i].toLocaleString("en")}`).join(", ");
  return chart({ kind: "histogram", label: options.label, height: () => 170 }, () => ({
    data: [middles, ...all.map((each) => each.map(scale))],
    options: {
      scales: { x: { time: false, range: [low, high] }, y: { range: [0, most * 1.04] } },
      series: [{}, ...all.map((_, k) => ({ stroke: colour(k ? "--cold-line" : "--dot"), fill: colour(k ? "--cold-fill" : "--dot"), width: k ? 1.5 : 0, points: { show: false }, paths: uPlot.paths.bars({ size: [1, Infinity], gap: k ? 0 : 1 }) }))],
      axes: [
        axis({ label: options.axis ?? "", size: 26, space: 60, grid: { show: false }, values: (/** @type {any} */ _, /** @type {number[]} */ at) => at.map(show) }),
        axis({ size: 46, space: 34, ...(options.log ? { splits: () => [0, 1, 10, 100, 1000, 10000, 100000, 1e6].map(scale).filter((at) => at <= most * 1.04), values: (/** @type {any} */ _, /** @type {number[]} */ at) => at.map((each) => number(Math.round(10 ** each - 1))) }
          : { values: (/** @type {any} */ _, /** @type {number[]} */ at) => at.map((each) => (Number.isInteger(each) ? number(each) : "")) }) }),
      ],
      cursor: { x: false, y: false, points: { show: false }, drag: { x: false, y: false } },
      hooks: { ready: [(/** @type {any} */ plot) => {
        plot.over.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => {
          const at = Math.floor((plot.posToVal(event.clientX - plot.over.getBoundingClientRect().left, "x") - low) / wide);
          if (at >= 0 && at < counts.length) showTip(says(at), event.clientX, event.clientY); else hideTip();
        });
        plot.over.addEventListener("pointerleave", hideTip);
      }] },
    },
  }));
}

/**
 * A scatter of latents: hover names them, a click opens one. The list below the map is the same for keyboards.
 * @param {{latents: number[], x: number[], y: number[]}} data
 * @param {{x: string, y: string, xLog: boolean, yLog: boolean, xShow: (value: number) => string, yShow: (value: number) => string, over: (latent: number|null, x: number, y: number) => void, open: (latent: number) => void}} options
 */
export function scatter(data, options) {
  const kept = data.latents.map((_, i) => i).filter((i) => (!options.xLog || data.x[i] > 0) && (!options.yLog || data.y[i] > 0));
  const xs = kept.map((i) => data.x[i]), ys = kept.map((i) => data.y[i]);
  const range = (/** @type {number[]} */ all, /** @type {boolean} */ log) => {
    let low = Infinity, high = -Infinity;
    for (const value of all) { low = Math.min(low, value); high = Math.max(high, value); }
    if (low > high) return log ? [0.1, 1] : [0, 1];
    const pad = log ? (high / low) ** 0.03 : (high - low || Math.abs(high) || 1) * 0.03;
    return log ? [low / Math.max(pad, 1.05), high * Math.max(pad, 1.05)] : [low - pad, high + pad];
  };
  const [xRange, yRange] = [range(xs, options.xLog), range(ys, options.yLog)];
  const size = xs.length > 20000 ? 1.6 : xs.length > 2000 ? 2.6 : 4;
  /** @param {any} plot */
  const dots = (plot) => {
    const pen = plot.ctx, ratio = devicePixelRatio || 1;
    pen.save();
    pen.beginPath(); pen.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height); pen.clip();
    pen.fillStyle = colour("--dot");
    pen.globalAlpha = xs.length > 20000 ? 0.4 : 0.55;
    for (let i = 0; i < xs.length; i++) {
      pen.beginPath(); pen.arc(plot.valToPos(xs[i], "x", true), plot.valToPos(ys[i], "y", true), size * ratio, 0, 7); pen.fill();
    }
    pen.restore();
    return null;
  };
  /** @param {any} plot */
  const ready = (plot) => {
    const px = xs.map((value) => plot.valToPos(value, "x")), py = ys.map((value) => plot.valToPos(value, "y"));
    const ring = el("div", { class: "ring", hidden: true });
    plot.over.append(ring);
    const nearest = (/** @type {MouseEvent} */ event) => {
      const area = plot.over.getBoundingClientRect(), mx = event.clientX - area.left, my = event.clientY - area.top;
      let best = -1, least = 18 * 18;
      for (let i = 0; i < px.length; i++) {
        const far = (px[i] - mx) ** 2 + (py[i] - my) ** 2;
        if (far < least) { least = far; best = i; }
      }
      return best;
    };
    plot.over.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => {
      const found = nearest(event);
      ring.hidden = found < 0;
      if (found >= 0) { ring.style.left = `${px[found]}px`; ring.style.top = `${py[found]}px`; }
      options.over(found >= 0 ? data.latents[kept[found]] : null, event.clientX, event.clientY);
    });
    plot.over.addEventListener("pointerleave", () => { ring.hidden = true; options.over(null, 0, 0); });
    plot.over.addEventListener("click", (/** @type {MouseEvent} */ event) => { const found = nearest(event); if (found >= 0) options.open(data.latents[kept[found]]); });
  };
  const grid = (/** @type {boolean} */ log) => ({ stroke: colour("--line"), width: 1, ...(log && { filter: (/** @type {any} */ _, /** @type {number[]} */ at) => at.map((each) => (Math.abs(Math.log10(each) - Math.round(Math.log10(each))) < 1e-6 ? each : null)) }) });
  const shown = (/** @type {(value: number) => string} */ show) => (/** @type {any} */ _, /** @type {(number|null)[]} */ at) => at.map((each) => (each === null ? "" : show(Number(each.toPrecision(6)))));
  return chart({ kind: "scatter", label: `${data.latents.length} latents: ${options.x} against ${options.y}`, height: () => (innerWidth < 640 ? 300 : 420) }, () => ({
    data: [null, [xs, ys]],
    options: {
      mode: 2,
      scales: { x: { time: false, distr: options.xLog ? 3 : 1, range: xRange }, y: { distr: options.yLog ? 3 : 1, range: yRange } },
      series: [{}, { facets: [{ scale: "x", auto: true }, { scale: "y", auto: true }], paths: dots }],
      axes: [axis({ scale: "x", label: options.x + (options.xLog ? " (log)" : ""), size: 30, grid: grid(options.xLog), values: shown(options.xShow) }), axis({ scale: "y", label: options.y + (options.yLog ? " (log)" : ""), size: 56, grid: grid(options.yLog), values: shown(options.yShow) })],
      cursor: { x: false, y: false, points: { show: false }, drag: { x: false, y: false } },
      hooks: { ready: [ready] },
    },
  }));
}
