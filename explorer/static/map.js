// All latents at once: a scatter, filters, full-text search, and the same latents as a list.
import { address, get, go, remember } from "./api.js";
import { scatter } from "./charts.js";
import { el, field, hideTip, number, percent, select, showTip, waiting } from "./dom.js";
import { places, table, whose } from "./tokens.js";

const LOGS = ["density", "largest", "mean"];
const SHARES = ["density", "token_share"];
const ROWS = 25;
/** How an axis writes its values. @param {string} name */
const shares = (name) => (SHARES.includes(name) ? (/** @type {number} */ value) => (value ? `${Number((100 * value).toPrecision(3))} %` : "0") : number);

/** @param {import("./main.js").Site} site @param {Record<string, string>} fields */
export function mapPage(site, fields) {
  const now = { sae: "0", x: "density", y: "token_share", sort: "token_share", down: "1", low: "", high: "", q: "", of: "", from: "0", ...fields };
  const chart = el("div", { class: "card map" }), list = el("div", { class: "card" });
  const shown = /** @type {any} */ (site.saes[Number(now.sae)] ?? site.saes[0]);
  const axes = /** @type {[string, string][]} */ (Object.entries(site.axes).filter(([name]) => shown.axes.includes(name)));
  const short = Object.fromEntries(Object.keys(site.axes).map((name) => [name, name.replace(/^relative_norm\./, "relative norm in ").replaceAll("_", " ")]));
  /** @type {Map<number, string>} */ const named = new Map();
  /** @type {number | null} */ let below = null; // the pointer

  const filters = () => address({ q: now.q, of: now.of, low: now.low === "" ? undefined : Number(now.low) / 100, high: now.high === "" ? undefined : Number(now.high) / 100 }).slice(1);

  const draw = () => waiting(chart, "Placing all latents…", async () => {
    const data = await get(`saes/${now.sae}/map?x=${now.x}&y=${now.y}&${filters()}`);
    const canvas = scatter(data, {
      x: short[now.x], y: short[now.y], xLog: LOGS.includes(now.x), yLog: LOGS.includes(now.y), xShow: shares(now.x), yShow: shares(now.y),
      open: (latent) => { hideTip(); go({ page: "feature", sae: now.sae, latent }); },
      over: async (latent, x, y) => {
        below = latent;
        if (latent === null) return hideTip();
        showTip(named.get(latent) ?? `#${latent}`, x, y);
        if (!named.has(latent)) {
          named.set(latent, `#${latent}`);
          const brief = await get(`saes/${now.sae}/brief/${latent}`);
          named.set(latent, `#${latent} · ${percent(brief.density)}\n${brief.explanation ?? brief.fires_on.map((/** @type {string} */ text) => JSON.stringify(text)).join("  ")}`);
          if (below === latent) showTip(named.get(latent) ?? "", x, y);
        }
      },
    });
    const some = data.latents.length < data.total ? `, ${data.latents.length.toLocaleString("en")} drawn at random` : "";
    return [canvas, el("p", { class: "soft small" }, `${data.total.toLocaleString("en")} latents${some}. ${short[now.x]}: ${site.axes[now.x]}. ${short[now.y]}: ${site.axes[now.y]}.`)];
  });

  const rows = () => waiting(list, "Sorting latents…", async () => {
    const from = Number(now.from);
    const found = await get(`saes/${now.sae}/latents?sort=${now.sort}&descending=${now.down === "1"}&offset=${from}&limit=${ROWS}&${filters()}`);
    const turn = (/** @type {number} */ to) => () => change({ from: String(to) }, false);
    return [
      el("div", { class: "bar" },
        field("List by", select("sort", axes.map(([name]) => [name, short[name]]), now.sort, (sort) => change({ sort, from: "0" }, false))),
        field("Order", select("down", [["1", "highest first"], ["0", "lowest first"]], now.down, (down) => change({ down, from: "0" }, false))),
        el("span", { class: "soft small grow" }, found.total ? `${from + 1} to ${from + found.rows.length} of ${found.total.toLocaleString("en")}` : "No latent fits the filters."),
        el("button", { type: "button", class: "quiet", disabled: from === 0, onclick: turn(Math.max(0, from - ROWS)) }, "Back"),
        el("button", { type: "button", class: "quiet", disabled: from + ROWS >= found.total, onclick: turn(from + ROWS) }, "More")),
      found.rows.length ? table(now.sae, found.rows, undefined, shown.parts) : "",
    ];
  });

  /** @param {Record<string, string>} fields @param {boolean} [map] */
  const change = (fields, map = true) => {
    Object.assign(now, fields);
    remember(Object.fromEntries(Object.keys(fields).map((name) => [name, /** @type {any} */ (now)[name]])));
    if (map) draw();
    rows();
  };
  let timer = 0;
  const typed = (/** @type {string} */ name) => (/** @type {any} */ event) => {
    clearTimeout(timer);
    timer = setTimeout(() => event.target.checkValidity() && change({ [name]: event.target.value, from: "0" }), 250);
  };
  const edge = (/** @type {string} */ name, /** @type {string} */ hint) => el("input", { type: "number", name, min: 0, max: 100, step: "any", value: /** @type {any} */ (now)[name], placeholder: hint, oninput: typed(name) });
  draw();
  rows();
  return [
    el("div", { class: "head" }, el("h1", {}, `All latents of ${shown.name}`),
      el("span", { class: "soft" }, `${shown.latents.toLocaleString("en")} latents at ${places(shown)}; ${number(shown.l0)} active per token; ${shown.silent.toLocaleString("en")} silent${shown.reading ? `; rows with ${shown.reading} only` : ""}`)),
    el("div", { class: "bar" },
      site.saes.length > 1 && field("SAE", select("sae", site.saes.map((sae, i) => [String(i), sae.name]), now.sae, (sae) => go({ ...now, page: "map", sae, from: "0" }))),
      el("label", { class: "field grow" }, "Search tokens and explanations", el("input", { type: "search", name: "q", maxlength: 200, value: now.q, oninput: typed("q") })),
      field("Across", select("x", axes.map(([name]) => [name, short[name]]), now.x, (x) => change({ x }))),
      field("Up", select("y", axes.map(([name]) => [name, short[name]]), now.y, (y) => change({ y }))),
      shown.axes.includes("direction_1") && el("a", { class: "button quiet", href: now.x === "direction_1" ? address({ page: "map", sae: now.sae }) : address({ page: "map", sae: now.sae, x: "direction_1", y: "direction_2" }) }, now.x === "direction_1" ? "By density" : "By direction"),
      shown.classes.length > 0 && field("Whose", select("of", [["", "all"], .../** @type {[string, string][]} */ (shown.classes.map((/** @type {string} */ name) => [name, whose(name)]))], now.of, (of) => change({ of, from: "0" }))),
      el("div", { class: "row" }, field("Density from, %", edge("low", "0")), field("to, %", edge("high", "100")))),
    chart, list,
  ];
}
