// Two SAEs side by side: figures, how well their directions match, and a latent's counterpart.
import { address, get, go } from "./api.js";
import { histogram } from "./charts.js";
import { el, field, level, number, percent, select, waiting } from "./dom.js";
import { about, link, strip, table, token } from "./tokens.js";

/** @param {import("./main.js").Site} site @param {Record<string, string>} fields */
export function comparePage(site, fields) {
  if (site.saes.length < 2) return [el("h1", {}, "Compare two SAEs"), el("p", { class: "note" }, "This server shows one SAE. Start it with two: winnow explore SAE_A SAE_B")];
  const one = fields.one ?? "0", other = fields.other ?? "1";
  const names = /** @type {[string, string][]} */ (site.saes.map((sae, i) => [String(i), sae.name]));
  const over = el("div"), single = el("div");
  waiting(over, "Comparing directions…", async () => overall(site, one, other, await get(`compare/${one}/${other}`)));
  const latent = el("input", { type: "number", name: "latent", min: 0, max: site.saes[Number(one)].latents - 1, required: true, value: fields.latent ?? "" });
  if (fields.latent) waiting(single, "Looking for counterparts…", () => counterpart(one, other, fields.latent));
  return [
    el("div", { class: "head" }, el("h1", {}, "Two SAEs side by side")),
    el("form", { class: "bar", onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); go({ page: "compare", one, other, latent: latent.value }); } },
      field("Left", select("one", names, one, (value) => go({ page: "compare", one: value, other }))),
      field("Right", select("other", names, other, (value) => go({ page: "compare", one, other: value }))),
      field("Latent of the left one", latent), el("button", {}, "Find its counterpart")),
    single, over,
  ];
}

/** @param {any} site @param {string} one @param {string} other @param {any} found */
function overall(site, one, other, found) {
  const [left, right] = [site.saes[Number(one)], site.saes[Number(other)]];
  const row = (/** @type {string} */ name, /** @type {(sae: any) => string} */ of) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "num" }, of(left)), el("td", { class: "num" }, of(right)));
  const whole = (/** @type {number} */ value) => value.toLocaleString("en");
  const bins = left.density_histogram;
  return el("div", { class: "pair" },
    el("section", { class: "card" }, el("h2", {}, "Figures"), el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "of"), el("th", { class: "num" }, left.name), el("th", { class: "num" }, right.name))), el("tbody", {},
      row("hook", (sae) => sae.hook), row("latents", (sae) => whole(sae.latents)), row("active per token", (sae) => number(sae.l0)), row("silent", (sae) => whole(sae.silent)), row("rows read", (sae) => whole(sae.rows))))),
    el("section", { class: "card" }, el("h2", {}, "Density of their latents"),
      histogram(bins.counts, bins.low, bins.high, { other: right.density_histogram.counts, names: [left.name, right.name], label: `Histograms of the densities of ${left.name} and ${right.name}`, axis: "share of tokens on which it fires (log)", show: (edge) => `${Number((100 * 10 ** edge).toPrecision(2))} %` }),
      el("p", { class: "legend" }, el("b", { class: "swatch" }), left.name, el("b", { class: "swatch other" }), right.name)),
    el("section", { class: "card" }, el("h2", {}, "Do their latents match?"),
      histogram(found.counts, found.low, found.high, { label: `Histogram of the best cosine; median ${number(found.median)}`, axis: "cosine with the best match" }),
      el("p", { class: "soft small" }, `Best cosine, in ${right.name}, of ${found.sampled} random latents of ${left.name}: median ${number(found.median)}, ${found["over_0.9"] ? percent(found["over_0.9"]) : "none"} over 0.9.`)),
    el("section", { class: "card" }, el("h2", {}, "Matches, from best to worst"), el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, el("th", {}, left.name), el("th", {}, right.name), el("th", { class: "num" }, "cosine"))),
      el("tbody", {}, found.pairs.map((/** @type {any} */ pair) => el("tr", {},
        el("td", {}, el("a", { href: address({ page: "compare", one, other, latent: pair.one.latent }) }, `#${pair.one.latent}`), " ", about(pair.one)),
        el("td", {}, link(other, pair.other.latent), " ", about(pair.other)), el("td", { class: "num" }, level(pair.score)))))))));
}

/** @param {string} one @param {string} other @param {string} latent */
async function counterpart(one, other, latent) {
  const found = await get(`compare/${one}/${other}/${latent}`);
  const best = found.matches[0];
  const [mine, theirs] = await Promise.all([get(`saes/${one}/features/${latent}`), get(`saes/${other}/features/${best.latent}`)]);
  const side = (/** @type {string} */ sae, /** @type {any} */ page) => el("section", { class: "card" },
    el("h2", {}, `${page.sae} `, link(sae, page.latent)), el("p", { class: "small" }, about(page.brief), ` · ${percent(page.brief.density)}`),
    page.promoted.length ? el("p", { class: "small" }, "promotes ", page.promoted.slice(0, 6).flatMap((/** @type {any} */ row) => [token(row.token), " "])) : "",
    page.examples.filter((/** @type {any} */ each) => each.band === -1).slice(0, 4).map((/** @type {any} */ each) => el("div", { class: "example" }, el("span", { class: "num" }, level(each.values[each.position - each.first])),
      strip(each.tokens, each.values, { most: page.figures.largest, peak: each.position - each.first, flat: true, label: "Example" }))));
  return [el("div", { class: "pair" }, side(one, mine), side(other, theirs)),
    el("section", { class: "card" }, el("h2", {}, "Nearest directions"), table(other, found.matches, "cosine"))];
}
