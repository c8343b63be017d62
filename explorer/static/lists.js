// Lists of latents that a user keeps: in this browser, in a link, or in a file.
import { address, get, go } from "./api.js";
import { el, field, select, waiting } from "./dom.js";
import { table } from "./tokens.js";

const STORED = "lists", KIND = "winnow.latents";
const MOST = 500; // latents of a list: a link of so many has 4 KB
const NAME = 80;

/** @typedef {{name: string, sae: string, latents: number[]}} List a list; `sae` is the digest of the SAE's weights */

/** A list that may come from anywhere; an error says what is wrong with it. @param {any} found @returns {List} */
function checked(found) {
  const name = typeof found?.name === "string" ? found.name.trim().slice(0, NAME) : "";
  if (!name) throw new Error("This list has no name.");
  if (!/^[0-9a-f]{64}$/.test(found.sae)) throw new Error("This list does not say to which SAE it belongs.");
  if (!Array.isArray(found.latents) || !found.latents.length) throw new Error("This list has no latents.");
  if (found.latents.length > MOST) throw new Error(`A list has at most ${MOST} latents; this one has ${found.latents.length}.`);
  if (!found.latents.every((/** @type {any} */ one) => Number.isInteger(one) && one >= 0 && one < 2 ** 31)) throw new Error("The latents of this list are not all numbers.");
  return { name, sae: found.sae, latents: [...new Set(/** @type {number[]} */ (found.latents))] };
}

/** What this browser keeps. @returns {List[]} */
export function kept() {
  try {
    return JSON.parse(localStorage.getItem(STORED) ?? "[]").map(checked);
  } catch {
    return []; // written by something else
  }
}

/** @param {List[]} lists */
const store = (lists) => localStorage.setItem(STORED, JSON.stringify(lists));
/** @param {List} one @param {List} other */
const same = (one, other) => one.name === other.name && one.sae === other.sae;

/** Keep a list in place of the one of its name. @param {List} list */
function keep(list) {
  store([...kept().filter((one) => !same(one, list)), list].sort((a, b) => a.name.localeCompare(b.name)));
}

/** The address of a list. @param {List} list */
const link = (list) => address({ page: "lists", name: list.name, of: list.sae, latents: list.latents.join(",") });

/** Add a latent to a list, on the latent's page. @param {import("./main.js").Site} site @param {string} sae @param {number} latent */
export function keeper(site, sae, latent) {
  const digest = (site.saes[Number(sae)] ?? site.saes[0]).sha256, place = el("span", { class: "row keeper" });
  const draw = () => {
    const mine = kept().filter((one) => one.sae === digest), inside = mine.filter((one) => one.latents.includes(latent));
    const name = el("input", { name: "list", list: "kept-lists", maxlength: NAME, required: true, placeholder: "name of a list", "aria-label": "Name of a list", value: mine[0]?.name ?? "" });
    place.replaceChildren(
      ...inside.map((one) => el("a", { class: "soft small", href: link(one) }, `in ${one.name}`)),
      el("form", { class: "row", onsubmit: (/** @type {Event} */ event) => {
        event.preventDefault();
        const list = mine.find((one) => one.name === name.value.trim()) ?? { name: name.value.trim(), sae: digest, latents: [] };
        try {
          keep(checked({ ...list, latents: [...list.latents, latent] }));
          draw();
        } catch (error) {
          name.setCustomValidity(error instanceof Error ? error.message : String(error));
          name.reportValidity();
        }
      }, oninput: () => name.setCustomValidity("") }, name, el("datalist", { id: "kept-lists" }, mine.map((one) => el("option", { value: one.name }))), el("button", { class: "quiet" }, "Keep")));
  };
  draw();
  return place;
}

/** @param {import("./main.js").Site} site @param {Record<string, string>} fields */
export function listsPage(site, fields) {
  const all = kept(), problem = el("p", { class: "error", role: "alert", hidden: true });
  const refuse = (/** @type {unknown} */ error) => { problem.textContent = error instanceof Error ? error.message : String(error); problem.hidden = false; };
  /** @type {List | undefined} */ let shown;
  if (fields.latents) {
    try { shown = checked({ name: fields.name, sae: fields.of, latents: fields.latents.split(",").map((one) => (one.trim() ? Number(one) : NaN)) }); } catch (error) { refuse(error); }
  }
  const file = el("input", { type: "file", accept: "application/json,.json", "aria-label": "A file with a list", onchange: async () => {
    try {
      problem.hidden = true;
      const found = JSON.parse(await file.files[0].text());
      if (found.kind !== KIND) throw new Error("This file is no list of latents.");
      const list = checked(found);
      keep(list);
      go(Object.fromEntries(new URLSearchParams(link(list))));
    } catch (error) { refuse(error instanceof SyntaxError ? new Error("This file is no JSON.") : error); }
  } });
  return [
    el("div", { class: "head" }, el("h1", {}, "Lists of latents"), el("span", { class: "soft" }, "They are kept in this browser; a link or a file shares one.")),
    el("section", { class: "card" },
      all.length ? el("ul", { class: "plain" }, all.map((one) => el("li", {}, el("a", { href: link(one), "aria-current": shown && same(one, shown) ? "true" : null }, one.name),
        el("span", { class: "soft small" }, ` · ${one.latents.length === 1 ? "1 latent" : `${one.latents.length} latents`} of ${owner(site, one)?.name ?? "an SAE that is not shown here"}`))))
        : el("p", { class: "note" }, "No list is kept yet. A latent's page has “Keep”."),
      el("div", { class: "bar" }, field("Open a list's file", file)), problem),
    shown ? one(site, shown, refuse) : "",
  ];
}

/** The shown SAE that a list belongs to. @param {import("./main.js").Site} site @param {List} list */
const owner = (site, list) => site.saes.find((sae) => sae.sha256 === list.sae);

/** @param {import("./main.js").Site} site @param {List} list @param {(error: unknown) => void} refuse */
function one(site, list, refuse) {
  const mine = kept().find((each) => same(each, list)), current = mine && mine.latents.join() === list.latents.join();
  const sae = owner(site, list), number = site.saes.findIndex((each) => each === sae), rows = el("div");
  const open = (/** @type {List} */ next) => go(Object.fromEntries(new URLSearchParams(link(next))));
  const change = (/** @type {any} */ next) => { try { const made = checked(next); store(kept().filter((each) => !same(each, list))); keep(made); open(made); } catch (error) { refuse(error); } };
  const save = () => {
    const url = URL.createObjectURL(new Blob([JSON.stringify({ kind: KIND, ...list }, null, 1)], { type: "application/json" }));
    el("a", { download: `${list.name.replace(/[^\p{L}\p{N}._-]+/gu, "-")}.json`, href: url }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  };
  if (sae) waiting(rows, "Reading the latents…", async () => {
    const found = await Promise.all(list.latents.filter((latent) => latent < sae.latents).map((latent) => get(`saes/${number}/brief/${latent}`)));
    return table(String(number), found);
  });
  const name = el("input", { name: "rename", maxlength: NAME, required: true, value: list.name });
  const drop = mine && select("drop", [["", "a latent…"], ...list.latents.map((latent) => /** @type {[string, string]} */ ([String(latent), `#${latent}`]))], "", (latent) => change({ ...list, latents: list.latents.filter((each) => String(each) !== latent) }));
  return el("section", { class: "card", id: "list" },
    el("div", { class: "head" }, el("h2", {}, list.name), el("span", { class: "row" },
      !current && el("button", { type: "button", onclick: () => { keep(list); open(list); } }, mine ? "Replace the kept list" : "Keep this list"),
      el("button", { type: "button", class: "quiet", onclick: save }, "Download"),
      mine && el("button", { type: "button", class: "quiet", onclick: () => { store(kept().filter((each) => !same(each, list))); go({ page: "lists" }); } }, "Delete"))),
    field("Link to this list", el("input", { readonly: true, value: new URL(link(list), location.href).href, onfocus: (/** @type {any} */ event) => event.target.select() })),
    mine && el("form", { class: "bar", onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); change({ ...list, name: name.value }); } },
      field("Name", name), el("button", { class: "quiet" }, "Rename"), field("Take out", drop)),
    sae ? rows : el("p", { class: "note" }, `It belongs to an SAE that is not shown here (weights ${list.sae.slice(0, 12)}…): latents ${list.latents.join(", ")}.`));
}
