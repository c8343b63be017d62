// Which latents fire on a text, token by token.
import { address, get, remember } from "./api.js";
import { el, field, number, select, waiting } from "./dom.js";
import { steerWith } from "./parts.js";
import { about, link, strip } from "./tokens.js";

export const SAMPLE = "In the beginning God created the heaven and the earth. To be, or not to be, that is the question.";

/** Why a request to the model may take long. @param {any} site @param {string} what */
export const slow = (site, what) => (site.subject.ready ? what : `Loading ${site.subject.model}, then ${what.charAt(0).toLowerCase()}${what.slice(1)}`);

/** A note on what is put before a text, if anything is. @param {import("./main.js").Site} site */
export const begins = (site) => (site.saes.some((sae) => sae.bos) ? "BOS is put before the text, as before every window of the dataset" : "");

/** @param {import("./main.js").Site} site @param {Record<string, string>} fields */
export function textPage(site, fields) {
  const now = { sae: "0", text: SAMPLE, ...fields };
  const out = el("div");
  const box = el("textarea", { name: "text", maxlength: site.limits.text, required: true }, now.text);
  const run = () => waiting(out, slow(site, "Reading the text…"), async () => {
    const found = await get(`saes/${now.sae}/text`, { text: box.value });
    site.subject.ready = true;
    return show(site, now.sae, found, Number(fields.at ?? -1));
  });
  if (fields.text) run();
  return [
    el("div", { class: "head" }, el("h1", {}, "Which latents fire on this text?"), el("span", { class: "soft" }, begins(site))),
    el("form", { class: "card", onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); remember({ text: box.value, sae: now.sae, at: undefined }); run(); } },
      field("Text", box),
      el("div", { class: "bar" },
        site.saes.length > 1 && field("SAE", select("sae", site.saes.map((sae, i) => [String(i), sae.name]), now.sae, (sae) => { now.sae = sae; })),
        el("button", {}, "Read"))),
    out,
  ];
}

/** @param {import("./main.js").Site} site @param {string} sae @param {any} found @param {number} at */
function show(site, sae, found, at) {
  const tokens = found.tokens.map((/** @type {any} */ one) => one.token), read = found.tokens.map((/** @type {any} */ one) => one.read);
  const counts = found.tokens.map((/** @type {any} */ one) => one.latents[0]?.[1] ?? 0);
  const detail = el("div", { "aria-live": "polite" });
  const pick = (/** @type {number} */ i) => {
    const one = found.tokens[i];
    remember({ at: i });
    detail.replaceChildren(el("h2", {}, "On ", el("code", { class: "token" }, one.token)),
      one.read ? el("ul", { class: "plain" }, one.latents.map((/** @type {any} */ [latent, value]) => el("li", {}, link(sae, latent), " ", el("span", { class: "soft num" }, number(value)), "  ", about(found.briefs[latent]))))
        : el("p", { class: "note" }, "The SAE is not trained on this position (the first of a window, or a sink), so it is not read."));
  };
  if (at >= 0 && at < tokens.length) pick(at);
  else detail.append(el("p", { class: "soft" }, "Choose a token to see its latents."));
  const strongest = Math.max(...found.latents.map((/** @type {any} */ one) => Math.max(...one.values)), 1e-9);
  return [
    el("div", { class: "columns" },
      el("section", { class: "card" }, el("h2", {}, "Every token, by its strongest latent"),
        strip(tokens, counts, { read, pick, label: "The text", says: (i) => (read[i] ? found.tokens[i].latents.slice(0, 4).map((/** @type {any} */ [latent, value]) => `#${latent}  ${number(value)}`).join("\n") || "nothing fires" : "not read") })),
      el("section", { class: "card" }, detail)),
    el("section", { class: "card" }, el("h2", {}, "Strongest over the whole text"),
      found.latents.map((/** @type {any} */ one) => el("div", { class: "example" }, el("span", {}, link(sae, one.latent)),
        el("div", {}, el("div", { class: "small" }, about(one)), strip(tokens, one.values, { most: strongest, read, label: `Latent ${one.latent}` })),
        site.saes[Number(sae)].steers && el("a", { class: "small", href: address({ page: "steer", edits: steerWith(site, sae, one) }) }, "steer")))),
  ];
}
