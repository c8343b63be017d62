// Latents of other layers of a set: those that feed a latent, and those that it feeds.
import { get, remember } from "./api.js";
import { el, field, level, select, waiting } from "./dom.js";
import { about, link } from "./tokens.js";

/** @typedef {import("./api.js").Brief & {sae: number, layer: number, weight: number, expected: number|null, together: number|null}} Related */

/** @param {import("./main.js").Site} site @param {string} sae @param {any} page @param {string} [order] */
export function across(site, sae, page, order) {
  if (!site.set) return "";
  const place = el("div", {}), path = `saes/${sae}/features/${page.latent}/relations`;
  const button = el("button", { type: "button", class: "quiet", onclick: async () => {
    button.disabled = true;
    await waiting(place, "Reading the other layers…", async () => found(await get(path), order));
    button.disabled = false;
  } }, "Look up");
  if (order) button.click();
  return el("section", { class: "card", id: "across" }, el("h2", {}, "Across layers"),
    el("p", { class: "soft small" }, "What earlier latents write into the direction that it reads, and what it writes into those of later ones: through the residual stream alone, without attention."), button, place);
}

/** @param {any} reply @param {string} [order] */
function found(reply, order) {
  const rows = el("div", {});
  const show = (/** @type {string} */ by) => {
    remember({ across: by });
    rows.replaceChildren(side(reply, reply.inputs[by], "Feed it", "No earlier latent does."), side(reply, reply.outputs[by], "Are fed by it", "No later latent is."));
  };
  const by = reply.rows ? (order === "by_weight" ? order : "expected") : "by_weight";
  show(by);
  return [
    reply.rows ? el("div", { class: "bar" }, field("Order by", select("across", [["expected", "weight × activity where it fires"], ["by_weight", "weight alone"]], by, show))) : "",
    rows, el("p", { class: "soft small" }, said(reply)),
  ];
}

/** @param {any} reply */
function said(reply) {
  const missing = reply.missing.length ? ` Not indexed, and so not here: layers ${reply.missing.join(", ")}.` : "";
  if (!reply.rows) return `There are weights only: it does not fire, or its dataset is not available.${missing}`;
  const rows = reply.drawn ? `${reply.rows} rows drawn from those on which it fires` : `${reply.rows} rows on which it fires`;
  return `Together: on how many of ${rows} the other latent fires too. A strong weight between latents that are never active together does nothing.${missing}`;
}

/** One table. @param {any} reply @param {Related[]} rows @param {string} title @param {string} none */
function side(reply, rows, title, none) {
  const signed = (/** @type {number} */ value) => (value < 0 ? "−" : "+") + level(Math.abs(value));
  const share = (/** @type {number|null} */ value) => (value === null ? "–" : `${(100 * value).toFixed(0)} %`);
  return el("div", { class: "relations" }, el("h3", {}, title), rows.length ? el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", {}, "layer"), el("th", {}, "latent"), el("th", {}, "fires on"),
      ...[...(reply.rows ? ["expected"] : []), "weight", ...(reply.rows ? ["together"] : [])].map((name) => el("th", { class: "num" }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, el("td", {}, String(row.layer)), el("td", {}, link(row.sae, row.latent)), el("td", {}, about(row)),
      reply.rows > 0 && el("td", { class: "num" }, row.expected ? signed(row.expected) : "0"), el("td", { class: "num" }, signed(row.weight)), reply.rows > 0 && el("td", { class: "num" }, share(row.together))))))) : el("p", { class: "note" }, none));
}
