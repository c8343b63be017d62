// What a node of a graph is: its figures, and a latent's card (explanation, promoted tokens, top windows).
import { address, get } from "./api.js";
import { EMBEDDING, ERROR, FEATURE, LOGIT } from "./circuit.js";
import { el, level, number } from "./dom.js";
import { plain } from "./canvas.js";
import { strip, token } from "./tokens.js";

const WINDOWS = 3;
const PROMOTED = 6;
const AROUND = 12; // tokens of a window on each side of its peak
/** @type {Map<string, Promise<any>>} */ const known = new Map();

/** A node in a few words. @param {import("./circuit.js").Circuit} graph @param {number} i */
export function says(graph, i) {
  const { nodes, tokens } = graph;
  if (nodes.kind[i] === LOGIT) return `${logit(nodes.label[i])} ${percentage(nodes.probability[i])}`;
  if (nodes.kind[i] === EMBEDDING) return JSON.stringify(tokens[nodes.position[i]] ?? "");
  if (nodes.kind[i] === ERROR) return "error";
  return nodes.label[i] || `#${nodes.latent[i] ?? "?"}`;
}

/** The token in circuit-tracer's label of a logit, `Output "x" (p=0.123)`. @param {string} label */
export const logit = (label) => /^Output "(.*)" \(p=[\d.]+\)$/s.exec(label)?.[1] ?? label;

/** Where a node is, and what kind it is. @param {import("./circuit.js").Circuit} graph @param {number} i */
export function place(graph, i) {
  const { nodes, tokens } = graph, at = `${plain(JSON.stringify(tokens[nodes.position[i]] ?? ""), 24)}, position ${nodes.position[i]}`;
  if (nodes.kind[i] === LOGIT) return "logit";
  if (nodes.kind[i] === EMBEDDING) return `embedding, position ${nodes.position[i]}`;
  if (nodes.kind[i] === ERROR) return `of layer ${nodes.layer[i]} at ${at}`;
  return `layer ${nodes.layer[i]}${nodes.label[i] ? ` #${nodes.latent[i] ?? "?"}` : ""} at ${at}`;
}

/** A latent's page of the index, asked for once. @param {number} sae @param {number} latent */
function feature(sae, latent) {
  const path = `saes/${sae}/features/${latent}`;
  if (!known.has(path)) known.set(path, get(path).catch((error) => { known.delete(path); throw error; }));
  return /** @type {Promise<any>} */ (known.get(path));
}

/** @param {import("./circuit.js").Circuit} graph @param {any} facts @param {number} i @param {number} share its influence */
export async function card(graph, facts, i, share) {
  const { nodes } = graph, latent = nodes.latent[i], sae = facts.saes[String(nodes.layer[i])];
  const figures = el("dl", { class: "facts small" },
    el("dt", {}, "influence on the logits"), el("dd", {}, percentage(share)),
    nodes.kind[i] === FEATURE && nodes.activation[i] !== null && [el("dt", {}, "activation here"), el("dd", {}, level(/** @type {number} */ (nodes.activation[i])))],
    nodes.kind[i] === LOGIT && [el("dt", {}, "probability"), el("dd", {}, percentage(nodes.probability[i]))]);
  if (nodes.kind[i] === ERROR) return [figures, el("p", { class: "soft small" }, "What the set's reconstruction of this MLP output lost; nothing says what it is about.")];
  if (nodes.kind[i] !== FEATURE || latent === null) return [figures];
  if (sae === undefined) return [figures, el("p", { class: "soft small" }, facts.other_set ? "The graph is of another set: its latents are not those that are indexed here." : "There is no index of this layer, so no examples: `winnow index SET` makes one.")];
  const page = await feature(sae, latent);
  const best = page.examples.filter((/** @type {any} */ one) => one.band === -1).slice(0, WINDOWS);
  return [
    page.explanations.length ? el("p", {}, page.explanations[0].text, " ", el("span", { class: "soft small" }, page.explanations[0].source)) : null,
    figures,
    page.promoted.length > 0 && el("p", { class: "small" }, el("span", { class: "soft" }, "promotes "), page.promoted.slice(0, PROMOTED).map((/** @type {any} */ one) => [token(one.token), " "])),
    best.length > 0 && el("div", {}, best.map((/** @type {any} */ one) => {
      const at = one.position - one.first, from = Math.max(0, at - AROUND), to = at + AROUND;
      return el("div", { class: "window" }, strip(one.tokens.slice(from, to), one.values.slice(from, to), { most: page.figures.largest, peak: at - from, flat: true, label: `Window with activation ${number(one.values[at])}` }));
    })),
    el("p", { class: "small" }, el("a", { href: address({ page: "feature", sae, latent }) }, `All about latent ${latent} of layer ${nodes.layer[i]}`)),
  ];
}

/** @param {number} share */
export const percentage = (share) => (share === 0 ? "none" : `${Number((100 * share).toPrecision(2))} %`);
