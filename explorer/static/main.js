// The shell: which page is shown, the theme, the keys.
import { address, get, go, state } from "./api.js";
import { el, hideTip, waiting } from "./dom.js";
import { comparePage } from "./compare.js";
import { featurePage } from "./feature.js";
import { graphPage } from "./graph.js";
import { listsPage } from "./lists.js";
import { mapPage } from "./map.js";
import { monitorPage } from "./monitor.js";
import { steerPage } from "./steer.js";
import { textPage } from "./text.js";

/** @typedef {{name: string, sha256: string, hook: string, steers: boolean, parts: {name: string, hook: string, model: string}[], classes: string[], reading: string, latents: number, vocabulary: number, bands: number, bos: boolean, axes: string[]}} Shown */
/** @typedef {{saes: Shown[], subject: {model: string, ready: boolean}, axes: Record<string, string>, graphs: boolean, limits: Record<string, number>, windows: boolean, labels: boolean, set: boolean}} Site */

/** @type {Record<string, [string, (site: any, fields: Record<string, string>) => Promise<any>|any]>} */
const PAGES = { map: ["Map", mapPage], feature: ["Feature", featurePage], text: ["Text", textPage], compare: ["Compare", comparePage], steer: ["Steer", steerPage], monitor: ["Monitor", monitorPage], lists: ["Lists", listsPage], graph: ["Circuit", graphPage] };
/** The pages that there is something for: graphs may be shown without an SAE, an SAE without graphs, and nothing steers with a transcoder between subjects. @param {Site|undefined} site */
const pagesOf = (site) => Object.keys(PAGES).filter((page) => (page === "graph" ? !site || site.graphs : page === "steer" ? !site || site.saes.some((sae) => sae.steers) : !site || site.saes.length > 0));

const main = /** @type {HTMLElement} */ (document.getElementById("main"));
const jump = /** @type {HTMLInputElement} */ (document.getElementById("jump-to"));
/** @type {Promise<Site>|null} */ let known = null;

async function show() {
  hideTip();
  const fields = state();
  known ??= get("site").catch((error) => { known = null; throw error; });
  // A failure is shown by `waiting` below, which asks again.
  const site = await known.catch(() => undefined), pages = pagesOf(site);
  const name = pages.includes(fields.page) ? fields.page : site?.graphs ? "graph" : "map";
  document.title = `${PAGES[name][0]}${name === "feature" ? ` ${fields.latent ?? 0}` : ""} · Winnow`;
  document.getElementById("pages")?.replaceChildren(...pages.map((page) =>
    el("a", { href: address({ page, sae: fields.sae, latent: page === "feature" || page === "compare" ? fields.latent : undefined, graph: page === "graph" ? fields.graph : undefined }), "aria-current": page === name ? "page" : null }, PAGES[page][0])));
  document.getElementById("jump")?.toggleAttribute("hidden", !!site && !site.saes.length);
  await waiting(main, name === "graph" ? "Reading the graphs…" : "Reading the index…", async () => {
    known ??= get("site").catch((error) => { known = null; throw error; });
    return PAGES[name][1](await known, fields);
  });
}

document.addEventListener("click", (event) => {
  const link = /** @type {Element} */ (event.target).closest?.("a[href^='?']");
  if (!link || event.metaKey || event.ctrlKey || event.shiftKey) return;
  event.preventDefault();
  history.pushState(null, "", link.getAttribute("href"));
  show().then(() => { main.focus({ preventScroll: true }); scrollTo(0, 0); });
});
addEventListener("popstate", show);

document.getElementById("jump")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const asked = jump.value.trim().replace(/^#/, ""), { sae } = state();
  go(/^\d+$/.test(asked) ? { page: "feature", sae, latent: asked } : { page: "map", sae, q: asked });
  jump.value = "";
  main.focus();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
  const target = /** @type {Element} */ (event.target);
  if (target.closest("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { jump.focus(); event.preventDefault(); }
  if (event.key === "[" || event.key === "]") document.querySelector(event.key === "[" ? "[rel=prev]" : "[rel=next]")?.dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true }));
});

const dark = matchMedia("(prefers-color-scheme: dark)");
/** @param {string|null} chosen */
function paint(chosen) {
  document.documentElement.dataset.theme = chosen ?? (dark.matches ? "dark" : "light");
  dispatchEvent(new Event("winnow-theme"));
}
document.getElementById("theme")?.addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", next);
  paint(next);
});
dark.addEventListener("change", () => paint(localStorage.getItem("theme")));
paint(localStorage.getItem("theme"));
show();
