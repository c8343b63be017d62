// Token strips (heat maps of text) and the small pieces that name a latent.
import { address } from "./api.js";
import { el, hideTip, level, number, percent, showTip } from "./dom.js";

/** A token as it can be seen: newlines and tabs get a mark. @param {string} token */
export const visible = (token) => token.replace(/\n/g, "↵\n").replace(/\t/g, "⇥");
/** @param {string} token */
export const token = (token) => el("code", { class: "token" }, token.replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅");

/**
 * Text with heat. Hover or move with the arrow keys to read the values.
 * @param {string[]} tokens @param {(number|null)[]} values
 * @param {{most?: number, peak?: number, read?: boolean[], label?: string, flat?: boolean, says?: (at: number) => string, pick?: (at: number) => void}} [options]
 */
export function strip(tokens, values, options = {}) {
  const most = options.most || Math.max(1e-9, ...values.map((value) => Math.abs(value ?? 0)));
  let at = options.peak ?? -1;
  const says = options.says ?? ((/** @type {number} */ i) => `${number(values[i] ?? 0)}`);
  const spans = tokens.map((text, i) => {
    const value = values[i] ?? 0;
    const span = el("span", { class: [value < 0 ? "down" : "", i === options.peak ? "peak" : "", options.read && !options.read[i] ? "unread" : ""].join(" ").trim() || null }, options.flat ? text.replace(/\n/g, "↵").replace(/\t/g, "⇥") : visible(text));
    if (value) span.style.setProperty("--a", String(Math.min(1, Math.abs(value) / most)));
    return span;
  });
  const show = (/** @type {number} */ i) => {
    const box = spans[i].getBoundingClientRect();
    showTip(says(i), box.left, box.bottom - 12);
  };
  const index = (/** @type {any} */ event) => spans.indexOf(event.target);
  const box = el("p", {
    class: options.pick ? "strip pick" : "strip", tabindex: 0, role: "group",
    "aria-label": `${options.label ?? "Tokens"}; arrow keys read the values`,
    onpointerover: (/** @type {any} */ event) => index(event) >= 0 && show(index(event)),
    onpointerleave: hideTip,
    onblur: () => { spans[at]?.classList.remove("at"); hideTip(); },
    onclick: (/** @type {any} */ event) => index(event) >= 0 && options.pick?.(index(event)),
    onkeydown: (/** @type {KeyboardEvent} */ event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) {
        spans[at]?.classList.remove("at");
        at = Math.max(0, Math.min(spans.length - 1, at + step));
        spans[at].classList.add("at");
        show(at);
        event.preventDefault();
      } else if (event.key === "Enter" && at >= 0) options.pick?.(at);
    },
  }, spans);
  return box;
}

/** What a latent is about, in a few words. @param {import("./api.js").Brief} brief */
export function about(brief) {
  if (brief.explanation) return [brief.explanation];
  if (!brief.density) return [el("span", { class: "soft" }, "never fires here")];
  return brief.fires_on.flatMap((text) => [token(text), " "]);
}

/** A link to a latent's page. @param {number|string} sae @param {number} latent */
export const link = (sae, latent) => el("a", { href: address({ page: "feature", sae, latent }) }, `#${latent}`);

/** Whose a latent of a crosscoder is, in words. @param {string} owner */
export const whose = (owner) => (["shared", "neither"].includes(owner) ? owner : `${owner} only`);

/** The hooks that an SAE reads. @param {import("./main.js").Shown} sae */
export const places = (sae) => (sae.parts.length ? sae.parts.map((part) => part.hook).join(" and ") : sae.hook);

/** Rows of latents. @param {number|string} sae @param {import("./api.js").Brief[]} rows @param {string} [score] @param {{name: string}[]} [parts] of a crosscoder */
export function table(sae, rows, score, parts = []) {
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", {}, "latent"), el("th", {}, "fires on"), el("th", { class: "wide" }, "promotes"),
      parts.length > 0 && [el("th", {}, "whose"), el("th", { class: "num" }, `relative norm in ${parts.map((part) => part.name).join(", ")}`)],
      el("th", { class: "num" }, score ?? "density"))),
    el("tbody", {}, rows.map((row) => el("tr", {}, el("td", {}, link(sae, row.latent)), el("td", {}, about(row)),
      el("td", { class: "wide" }, row.promotes.flatMap((text) => [token(text), " "])),
      parts.length > 0 && [el("td", {}, whose(row.owner ?? "")), el("td", { class: "num" }, (row.norms ?? []).map((norm) => norm.toFixed(2)).join(", "))],
      el("td", { class: "num" }, score ? level(row.score ?? 0) : percent(row.density)))))));
}
