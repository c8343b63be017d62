// Monitor chosen latents over a text, and export the result as JSON.
import { get, remember } from "./api.js";
import { el, field, number, select, waiting } from "./dom.js";
import { SAMPLE, begins, slow } from "./text.js";
import { about, link, strip } from "./tokens.js";

/** @param {import("./main.js").Site} site @param {Record<string, string>} fields */
export function monitorPage(site, fields) {
  const now = { sae: "0", text: SAMPLE, latents: "", ...fields };
  const out = el("div");
  const text = el("textarea", { name: "text", maxlength: site.limits.text, required: true }, now.text);
  const chosen = el("input", { name: "latents", required: true, pattern: "[0-9]+([, ]+[0-9]+)*", placeholder: "12, 407", value: now.latents, title: "Numbers of latents, separated by commas" });
  const run = () => waiting(out, slow(site, "Reading the text…"), async () => {
    const latents = chosen.value.split(/[, ]+/).filter(Boolean).map(Number);
    const [report, ...briefs] = await Promise.all([get(`saes/${now.sae}/monitor`, { text: text.value, latents }), ...latents.map((/** @type {number} */ latent) => get(`saes/${now.sae}/brief/${latent}`))]);
    site.subject.ready = true;
    const save = () => {
      const link = el("a", { download: "monitor.json", href: URL.createObjectURL(new Blob([JSON.stringify(report, null, 1)], { type: "application/json" })) });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    };
    return el("section", { class: "card" },
      el("div", { class: "head" }, el("h2", {}, `${report.tokens.length} tokens, ${latents.length} latents`), el("button", { type: "button", class: "quiet", onclick: save }, "Export JSON")),
      report.latents.map((/** @type {any} */ one, /** @type {number} */ i) => el("div", { class: "example" }, el("span", {}, link(now.sae, one.latent)),
        el("div", {}, el("div", { class: "small" }, about(briefs[i])), strip(report.tokens, one.values, { most: Math.max(briefs[i].largest, one.largest), read: report.read, label: `Latent ${one.latent}` })),
        el("span", { class: "soft small num" }, `on ${one.fires}`, el("br"), `up to ${number(one.largest)}`))));
  });
  if (fields.latents) run();
  return [
    el("div", { class: "head" }, el("h1", {}, "Monitor"), el("span", { class: "soft" }, `Heat is relative to the largest activation the index has seen. ${begins(site)}`)),
    el("form", { class: "card", onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); remember({ text: text.value, latents: chosen.value, sae: now.sae }); run(); } },
      field("Text", text),
      el("div", { class: "bar" },
        site.saes.length > 1 && field("SAE", select("sae", site.saes.map((sae, i) => [String(i), sae.name]), now.sae, (sae) => { now.sae = sae; })),
        field("Latents", chosen), el("button", {}, "Watch"))),
    out,
  ];
}
