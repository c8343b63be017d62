// Elements, the tooltip, waiting and failing. Text always goes in as text nodes: nothing is ever parsed as HTML.

/** @typedef {Record<string, any>} Props */

/**
 * Make an element. `on...` props are listeners, `class` is the class, other props are attributes.
 * @param {string} tag @param {Props} [props] @param {...any} children @returns {any}
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  set(node, props);
  node.append(...shown(children));
  return node;
}

/** Children without those that are none: the browser itself would write "null". @param {any[]} children @returns {any[]} */
const shown = (children) => children.flat(4).filter((child) => child !== null && child !== undefined && child !== false);

/** @param {string} tag @param {Props} [props] @param {...any} children @returns {any} */
export function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(node, props);
  node.append(...children.flat());
  return node;
}

/** @param {Element} node @param {Props} props */
function set(node, props) {
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value));
  }
}

/** A labelled control. @param {string} label @param {any} control @param {string} [kind] */
export const field = (label, control, kind = "field") => el("label", { class: kind }, label, control);

/** @param {string} name @param {[string, string][]} options @param {string} chosen @param {(value: string) => void} change */
export function select(name, options, chosen, change) {
  return el("select", { name, onchange: (/** @type {any} */ event) => change(event.target.value) },
    options.map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
}

/** @param {number} value */
export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size >= 0.01) return String(Number(value.toPrecision(3)));
  return value.toExponential(1).replace("e", "e");
}

/** An activation, always of three figures so that a column of them lines up. @param {number} value */
export const level = (value) => (value === 0 ? "0" : Math.abs(value) >= 0.001 && Math.abs(value) < 1000 ? value.toPrecision(3) : number(value));

/** A share, for people. @param {number} value */
export const percent = (value) => (value === 0 ? "never" : value >= 0.0995 ? `${(value * 100).toFixed(0)} %` : `${Number((value * 100).toPrecision(2))} %`);

const tip = /** @type {HTMLElement} */ (document.getElementById("tip"));

/** Show words beside a point of the window. @param {string} text @param {number} x @param {number} y */
export function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + box.height + 24 > innerHeight ? y - box.height - 10 : y + 16}px`;
}

export function hideTip() { tip.hidden = true; }

/**
 * Run something slow: show `why` after 200 ms, then the result or the error.
 * @param {HTMLElement} place @param {string} why @param {() => Promise<any>} work
 */
export async function waiting(place, why, work) {
  const mine = {};
  /** @type {any} */ (place).work = mine;
  const current = () => /** @type {any} */ (place).work === mine;
  const timer = setTimeout(() => current() && place.replaceChildren(el("p", { class: "waiting", role: "status" }, why)), 200);
  try {
    const made = await work();
    if (current() && made) place.replaceChildren(...shown([made]));
  } catch (error) {
    if (current()) place.replaceChildren(el("p", { class: "error", role: "alert" }, error instanceof Error ? error.message : String(error)));
  } finally {
    clearTimeout(timer);
  }
}
