// Latents of other layers of a set: those that feed a latent, and those that it feeds.
import { get, remember } from "./api.js";
import { el, field, level, percent, select, waiting } from "./dom.js";
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
  const show = (/** @type {"expected"|"by_weight"} */ by) => {
    remember({ across: by });
    rows.replaceChildren(side(reply, by, "inputs", "Feed it", "No earlier latent does."), side(reply, by, "outputs", "Are fed by it", "No later latent is."));
  };
  const by = reply.rows ? (order === "by_weight" ? order : "expected") : "by_weight";
  show(by);
  return [
    reply.rows ? el("div", { class: "bar" }, field("Order by", select("across", [["expected", "weight × activity where it fires"], ["by_weight", "weight alone"]], by, (chosen) => show(chosen === "by_weight" ? chosen : "expected")))) : "",
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

/** One table, in the order of `by`. @param {any} reply @param {"expected"|"by_weight"} by @param {"inputs"|"outputs"} of @param {string} title @param {string} none */
function side(reply, by, of, title, none) {
  const signed = (/** @type {number} */ value) => (value < 0 ? "−" : value ? "+" : "") + level(Math.abs(value));
  // Narrow screens show the figure that orders the rows; without rows of the dataset there are weights only.
  /** @type {[string, string, (row: Related) => string][]} */
  const columns = [["weight", by === "by_weight" ? "num" : "num wide", (row) => signed(row.weight)]];
  if (reply.rows) columns.unshift(["expected", by === "expected" ? "num" : "num wide", (row) => signed(row.expected ?? 0)]);
  if (reply.rows) columns.push(["together", "num", (row) => percent(row.together ?? 0)]);
  const rows = /** @type {Related[]} */ (reply[of][by]);
  return el("div", { class: "relations" }, el("h3", {}, title), !rows.length ? el("p", { class: "note" }, none) : el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", {}, "layer"), el("th", {}, "latent"), el("th", {}, "fires on"), columns.map(([name, kind]) => el("th", { class: kind }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, el("td", {}, String(row.layer)), el("td", {}, link(row.sae, row.latent)), el("td", {}, about(row)), columns.map(([, kind, says]) => el("td", { class: kind }, says(row)))))))));
}
