// More of the text around an example, across the windows of its document.
import { get } from "./api.js";
import { el, number, waiting } from "./dom.js";
import { strip } from "./tokens.js";

const STEP = 200; // tokens that are added at a time on a side

/** A button that shows more text, and the place of that text. @param {any} site @param {string} sae @param {any} page @param {any} one an example */
export function wider(site, sae, page, one) {
  const place = el("div", { class: "effect wider", hidden: true }), asked = { before: STEP, after: STEP };
  const read = () => waiting(place, "Reading the dataset…", () => text(site, sae, page, one, asked, again));
  // The button that asked for more is gone then: whoever uses keys goes on from the text.
  const again = () => read().then(() => place.querySelector(".strip")?.focus({ preventScroll: true }));
  const button = el("button", { type: "button", class: "quiet", "aria-expanded": "false", onclick: () => {
    place.hidden = !place.hidden;
    button.setAttribute("aria-expanded", String(!place.hidden));
    if (!place.hidden) read();
  } }, "More text");
  return [button, place];
}

/** @param {any} site @param {string} sae @param {any} page @param {any} one @param {{before: number, after: number}} asked @param {() => Promise<void>} again */
async function text(site, sae, page, one, asked, again) {
  const found = await get(`saes/${sae}/context?${new URLSearchParams({ window: one.window, position: one.position, before: String(asked.before), after: String(asked.after) })}`);
  const known = new Map(one.values.map((/** @type {number} */ value, /** @type {number} */ i) => [found.at - (one.position - one.first) + i, value]));
  const values = found.tokens.map((/** @type {string} */ _, /** @type {number} */ i) => known.get(i) ?? 0);
  const more = (/** @type {"before"|"after"} */ where, /** @type {string} */ words) => found[where] && asked[where] < site.limits.around &&
    el("button", { type: "button", class: "quiet", onclick: () => { asked[where] = Math.min(site.limits.around, asked[where] + STEP); again(); } }, words);
  const says = (/** @type {number} */ i) => (known.has(i) ? number(values[i]) : "its activation here is not in the index");
  const ends = !found.document ? "This is the text of the window: its documents cannot be told apart, or are too many to be searched."
    : found.begins && !found.after ? "This is the whole document, as far as the dataset has it."
      : found.begins ? "The document begins here." : !found.before && !found.after ? "The dataset has no more of this document." : "";
  return [el("div", { class: "row" }, more("before", "Earlier"), more("after", "Later")),
    strip(found.tokens, values, { most: page.figures.largest, peak: found.at, says, label: "The text around the example" }), el("p", { class: "soft small" }, `${found.tokens.length.toLocaleString("en")} tokens; colour where the index has activations. ${ends}`)];
}
