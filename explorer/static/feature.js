// One latent: what it fires on, from strongest to weakest, what it promotes, and its neighbours.
import { across } from "./across.js";
import { address, get, remember } from "./api.js";
import { histogram } from "./charts.js";
import { wider } from "./context.js";
import { el, field, level, number, percent, select, waiting } from "./dom.js";
import { keeper } from "./lists.js";
import { steerWith } from "./parts.js";
import { about, strip, table, token, whose } from "./tokens.js";

/** @param {import("./main.js").Site} site @param {Record<string, string>} fields */
export async function featurePage(site, fields) {
  const sae = fields.sae ?? "0", latent = Number(fields.latent ?? 0);
  const last = (site.saes[Number(sae)] ?? site.saes[0]).latents - 1;
  const page = await get(`saes/${sae}/features/${latent}`);
  const turn = (/** @type {number} */ to, /** @type {string} */ rel, /** @type {string} */ text) => to >= 0 && to <= last &&
    el("a", { class: "button quiet", rel, href: address({ page: "feature", sae, latent: to, band: fields.band }), title: rel === "prev" ? "Key: [" : "Key: ]" }, text);
  return [
    el("div", { class: "head" },
      el("div", {}, el("h1", {}, `Latent ${latent}`), el("p", { class: "soft" }, `${page.sae} · `, about(page.brief))),
      el("div", { class: "row" }, turn(latent - 1, "prev", "← Previous"), turn(latent + 1, "next", "Next →"),
        el("a", { class: "button quiet", href: address({ page: "monitor", sae, latents: latent }) }, "Watch"),
        site.saes[Number(sae)].steers && el("a", { class: "button", href: address({ page: "steer", edits: steerWith(site, sae, page.brief) }) }, "Steer with it")),
      keeper(site, sae, latent)),
    page.explanations.length ? el("div", { class: "card" }, el("h2", {}, "Explanations"), el("ul", { class: "plain" }, page.explanations.map((/** @type {any} */ one) =>
      el("li", {}, one.text, " ", el("span", { class: "soft small" }, `${one.source}${one.score === null ? "" : ` · ${number(one.score)}`}`))))) : "",
    el("div", { class: "columns" }, el("div", {}, examples(site, sae, page, fields.band, fields.kind), across(site, sae, page, fields.across), neighbours(sae, page), embedding(sae, page)), aside(site, sae, page)),
  ];
}

/** @param {any} site @param {string} sae @param {any} page @param {string} [band] @param {string} [kind] */
function examples(site, sae, page, band, kind = "") {
  const bands = page.quantiles.length - 1;
  /** @type {[string, string, string][]} */
  const tabs = [["-1", "Strongest", "The windows with its highest activations, of all windows that are indexed."]];
  for (let i = bands - 1; i >= 0; i--) {
    const [low, high] = [Math.round((100 * i) / bands), Math.round((100 * (i + 1)) / bands)];
    tabs.push([String(i), `${low}–${high} %`, `Drawn at random where it fires between ${level(page.quantiles[i])} and ${level(page.quantiles[i + 1])}: the ${low} to ${high} % of its activations.`]);
  }
  const present = tabs.filter(([key]) => page.examples.some((/** @type {any} */ one) => String(one.band) === key));
  const list = el("div", { role: "tabpanel", id: "examples", tabindex: -1 }), says = el("p", { class: "soft small" });
  const buttons = present.map(([key, title, words]) => el("button", {
    type: "button", role: "tab", "aria-controls": "examples", "data-key": key,
    onclick: () => { remember({ band: key === "-1" ? undefined : key }); choose(key, words); },
    onkeydown: (/** @type {KeyboardEvent} */ event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = buttons[(buttons.indexOf(event.target) + step + buttons.length) % buttons.length];
      next.click();
      next.focus();
    },
  }, title));
  const choose = (/** @type {string} */ key, /** @type {string} */ words) => {
    for (const button of buttons) {
      button.setAttribute("aria-selected", String(button.dataset.key === key));
      button.tabIndex = button.dataset.key === key ? 0 : -1;
    }
    says.textContent = words;
    const shown = page.examples.filter((/** @type {any} */ one) => String(one.band) === key && fits(one, kind));
    list.replaceChildren(...(shown.length ? shown.map((/** @type {any} */ one) => example(site, sae, page, one)) : [el("p", { class: "note" }, "None of these examples is of that kind.")]));
  };
  const first = present.find(([key]) => key === (band ?? "-1")) ?? present[0];
  if (first) choose(first[0], first[2]);
  const kinds = el("div", { class: "kinds" });
  // Apart from the page, which must not wait for the dataset.
  if (first && site.labels) labelled(sae, page).then((options) => {
    if (options.length < 3) return;
    kinds.replaceChildren(field("On tokens of", select("kind", options, kind, (chosen) => { kind = chosen; remember({ kind }); again(); })));
    if (kind) again();
    // In place: a window that is being ablated stays.
    for (const one of page.examples) if (one.badge) one.badge.textContent = one.kind;
  }, (error) => kinds.replaceChildren(el("p", { class: "soft small" }, error.message)));
  const again = () => buttons.forEach((button, i) => button.getAttribute("aria-selected") === "true" && choose(present[i][0], present[i][2]));
  return el("section", { class: "card" },
    el("div", { class: "head" }, el("h2", {}, "Where it fires"), el("span", { class: "legend" }, "0", el("i"), level(page.figures.largest))),
    present.length ? [el("div", { class: "tabs", role: "tablist", "aria-label": "Parts of its activations" }, buttons), kinds, says, list]
      : el("p", { class: "note" }, "It fires on no token of the indexed windows."));
}

/** Whether an example is of a kind, such as `role:2`; all are of the empty one. @param {any} one @param {string} kind */
function fits(one, kind) {
  const [name, value] = kind.split(":");
  return !kind || !one.label || String(one.label[name]) === value;
}

/** Give the examples their labels; returns the kinds there are, with counts. @param {string} sae @param {any} page @returns {Promise<[string, string][]>} */
async function labelled(sae, page) {
  const found = await get(`saes/${sae}/features/${page.latent}/labels`), names = { role: found.roles, source: found.sources };
  /** @type {Map<string, number>} */ const counts = new Map();
  page.examples.forEach((/** @type {any} */ one, /** @type {number} */ i) => {
    one.label = found.tokens[i];
    one.kind = [found.roles.length > 1 && found.roles[one.label.role] !== "none" && `${found.roles[one.label.role]}, turn ${one.label.turn}`, found.sources.length > 1 && found.sources[one.label.source]].filter(Boolean).join(" · ");
    for (const name of ["role", "source"]) counts.set(`${name}:${one.label[name]}`, (counts.get(`${name}:${one.label[name]}`) ?? 0) + 1);
  });
  const of = (/** @type {"role"|"source"} */ name) => [...counts].filter(([kind]) => kind.startsWith(`${name}:`)).sort();
  // A label that is the same for all divides nothing.
  return [["", `all ${page.examples.length} examples`], .../** @type {const} */ (["role", "source"]).flatMap((name) => of(name).length < 2 ? [] : of(name).map(([kind, count]) => /** @type {[string, string]} */ ([kind, `${name} ${names[name][Number(kind.split(":")[1])]} (${count})`])))];
}

/** @param {any} site @param {string} sae @param {any} page @param {any} one */
function example(site, sae, page, one) {
  one.badge = el("span", { class: "soft small of" }, one.kind);
  const effect = el("div", { class: "effect", hidden: true }), at = one.position - one.first, parts = page.parts;
  const says = (/** @type {number} */ i) => `${number(one.values[i])}${one.values[i] && parts.length ? ` = ${sum(parts, one, i)}` : ""}${one.position - at + i === 0 ? "\nthe window's first token, which is not read" : ""}`;
  // Of a crosscoder a button for each part: its direction is removed in its own subject.
  const buttons = partsOrNone(parts).map((part) => {
    const button = el("button", { type: "button", class: "quiet", "aria-expanded": "false", onclick: () => {
      const open = button.getAttribute("aria-expanded") !== "true";
      for (const each of buttons) each.setAttribute("aria-expanded", String(open && each === button));
      effect.hidden = !open;
      if (open) waiting(effect, site.subject.ready ? "Running the window with and without the latent…" : "Loading the subject model, then running the window twice…", () => ablation(site, sae, page.latent, one.window, part));
    } }, part ? `Ablate in ${part}` : "Ablate");
    return button;
  });
  const [more, text] = wider(site, sae, page, one);
  return el("div", { class: "example" }, el("span", { class: "num", title: "its activation at the marked token" }, level(one.values[at])),
    parts.length ? beside(page, one, at, says) : strip(one.tokens, one.values, { most: page.figures.largest, peak: at, says, flat: true, label: `Example with activation ${number(one.values[at])}` }),
    one.badge, site.windows && el("span", { class: "row acts" }, more, site.saes[Number(sae)].steers && buttons), text, effect);
}

/** What an activation of a crosscoder's latent is the sum of. @param {any[]} parts @param {any} one @param {number} i */
function sum(parts, one, i) {
  const shares = one.parts.map((/** @type {number[]} */ each) => each[i]);
  /** @type {[number, string][]} */ const terms = [...parts.map((part, m) => /** @type {[number, string]} */ ([shares[m], part.name])), [one.values[i] - shares.reduce((/** @type {number} */ all, /** @type {number} */ each) => all + each, 0), "bias"]];
  return terms.map(([value, name], m) => `${value < 0 ? "− " : m ? "+ " : ""}${number(Math.abs(value))} ${name}`).join(" ");
}

/** Of a crosscoder: the activation, and below it what each part contributes at the same tokens. @param {any} page @param {any} one @param {number} at @param {(i: number) => string} says */
function beside(page, one, at, says) {
  const line = (/** @type {string} */ name, /** @type {number[]} */ values, /** @type {string} */ label) => el("div", { class: "part" },
    el("span", { class: "soft small" }, name, el("span", { class: "num" }, level(values[at]))), strip(one.tokens, values, { most: page.figures.largest, peak: at, says, flat: true, label }));
  return el("div", { class: "parts" }, line("together", one.values, `Example with activation ${number(one.values[at])}`),
    page.parts.map((/** @type {any} */ part, /** @type {number} */ m) => line(part.name, one.parts[m], `What ${part.name} contributes to it`)));
}

/** The names of a crosscoder's parts; an empty one for another SAE. @param {any[]} parts @returns {string[]} */
const partsOrNone = (parts) => (parts.length ? parts.map((part) => part.name) : [""]);

/** How the model's predictions change without the latent. @param {any} site @param {string} sae @param {number} latent @param {number} window @param {string} part */
async function ablation(site, sae, latent, window, part) {
  const found = await get(`saes/${sae}/ablate`, { latent, window, part });
  site.subject.ready = true;
  const votes = (/** @type {any[]} */ all) => all.map((one) => `${JSON.stringify(one.token)} ${one.change > 0 ? "+" : "−"}${Math.abs(100 * one.change).toFixed(1)} %`).join("   ");
  const next = (/** @type {number} */ i) => `after ${JSON.stringify(found.tokens[i])}: loss ${found.loss_change[i] === null ? "–" : number(found.loss_change[i])} nats, KL ${number(found.kl[i])}` +
    (found.down[i].length ? `\nless likely without it: ${votes(found.down[i])}` : "") + (found.up[i].length ? `\nmore likely without it: ${votes(found.up[i])}` : "");
  const felt = found.kl.reduce((/** @type {number} */ best, /** @type {number} */ kl, /** @type {number} */ i) => (kl > found.kl[best] ? i : best), 0);
  const cell = (/** @type {any[]} */ all) => all.map((one) => el("span", { class: "vote" }, token(one.token), ` ${one.change > 0 ? "+" : "−"}${Math.abs(100 * one.change).toFixed(1)}`));
  return [
    el("div", { class: "head" }, el("h2", {}, "Without it: change of the next token's loss"), el("span", { class: "legend" }, "better", el("i", { class: "both" }), "worse")),
    strip(found.tokens, found.loss_change, { says: next, peak: felt, label: "Change of loss by token" }),
    el("p", { class: "small" }, "Largest effect after ", token(found.tokens[felt]), `, KL ${number(found.kl[felt])} nats. Change of the next token's probability there, in percentage points: `, cell(found.down[felt]), cell(found.up[felt])),
  ];
}

/** What steering with the latent promotes. @param {any} site @param {string} sae @param {any} page */
function steered(site, sae, page) {
  if (!site.windows || !page.figures.fires || !site.saes[Number(sae)].steers) return "";
  const place = el("div", {});
  const buttons = partsOrNone(page.parts).map((part) => el("button", { type: "button", class: "quiet", onclick: async () => {
    for (const button of buttons) button.disabled = true;
    await waiting(place, site.subject.ready ? "Running windows with and without it…" : "Loading the subject model, then running windows with and without it…", () => measured(site, sae, page, part));
    for (const button of buttons) button.disabled = false;
  } }, part ? `Measure in ${part}` : "Measure"));
  return el("section", { class: "card", id: "steered" }, el("h2", {}, "Promotes, when steered"),
    el("p", { class: "soft small" }, "The whole model runs: what becomes likelier when the latent is clamped to its largest activation."), el("div", { class: "row" }, buttons), place);
}

/** @param {any} site @param {string} sae @param {any} page @param {string} part */
async function measured(site, sae, page, part) {
  const found = await get(`saes/${sae}/promotion`, { latent: page.latent, part });
  site.subject.ready = true;
  const where = part && ` in ${part}`, rows = (/** @type {string} */ name, /** @type {any[]} */ all) => el("table", {}, el("caption", { class: "small" }, name),
    el("thead", { class: "hidden" }, el("tr", {}, el("th", {}, "token"), el("th", {}, "change of log-probability, nats"))),
    el("tbody", {}, all.map((row) => el("tr", {}, el("td", {}, token(row.token)), el("td", { class: "num" }, `${row.score > 0 ? "+" : "−"}${level(Math.abs(row.score))}`)))));
  const shared = found.direct.filter((/** @type {any} */ one) => one.shared).length;
  const ranks = found.direct.map((/** @type {any} */ one) => one.rank).sort((/** @type {number} */ a, /** @type {number} */ b) => a - b);
  return [
    found.direct.length ? el("p", { class: "small verdict" }, `${shared} of the ${found.direct.length} tokens that its direction alone promotes are among these ${found.up.length}; their median rank is ${ranks[Math.floor((ranks.length - 1) / 2)].toLocaleString("en")} of ${site.saes[Number(sae)].vocabulary.toLocaleString("en")}.`) : "",
    rows(`More likely${where}`, found.up), rows(`Less likely${where}`, found.down),
    el("p", { class: "soft small" }, `Mean change of log-probability in nats, over ${found.positions.toLocaleString("en")} positions of ${found.windows} windows; clamped to ${level(found.strength)}; KL ${number(found.kl)} nats.`),
  ];
}

/** @param {any} site @param {string} sae @param {any} page */
function aside(site, sae, page) {
  const facts = page.figures;
  const logits = (/** @type {string} */ title, /** @type {any[]} */ rows) => rows.length ? el("section", { class: "card" }, el("h2", {}, title), el("p", { class: "soft small" }, "Logits of its direction alone: the direct path, which skips the layers in between."),
    el("table", {}, el("thead", { class: "hidden" }, el("tr", {}, el("th", {}, "token"), el("th", {}, "logit"))), el("tbody", {}, rows.map((row) => el("tr", {}, el("td", {}, token(row.token)), el("td", { class: "num" }, level(row.score))))))) : "";
  return el("aside", { "aria-label": "Figures" }, owner(site, sae, page),
    el("section", { class: "card" }, el("h2", {}, "Activations"),
      facts.fires ? histogram(page.histogram, 0, facts.largest, { label: `Histogram of ${facts.fires} activations from 0 to ${number(facts.largest)}, logarithmic counts of tokens`, log: true, axis: "activation; height: tokens, log", names: ["tokens"] }) : "",
      el("dl", { class: "facts" }, [
        ["fires on", percent(page.brief.density)], ["tokens", facts.fires.toLocaleString("en")], ["largest", level(facts.largest)], ["mean when it fires", level(facts.mean)],
        ["cosine, encoder and decoder", level(facts.enc_dec_cosine)],
      ].map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]))),
    page.tokens.length ? el("section", { class: "card" }, el("h2", {}, "Fires on these tokens"), el("p", { class: "soft small" }, "Share of its summed activation."), el("table", {}, el("thead", { class: "hidden" }, el("tr", {}, el("th", {}, "token"), el("th", {}, "share"))), el("tbody", {}, page.tokens.map((/** @type {any} */ row) =>
      el("tr", {}, el("td", {}, token(row.token)), el("td", { class: "num" }, row.score < 0.005 ? "< 1 %" : `${(100 * row.score).toFixed(0)} %`)))))) : "",
    page.parts.length ? page.parts.map((/** @type {any} */ part) => [logits(`Promotes in ${part.name}`, part.promoted), logits(`Suppresses in ${part.name}`, part.suppressed)])
      : [logits("Promotes, by its direction", page.promoted), logits("Suppresses, by its direction", page.suppressed)], steered(site, sae, page));
}

/** Of a crosscoder: whose the latent is. @param {any} site @param {string} sae @param {any} page */
function owner(site, sae, page) {
  if (!page.parts.length) return "";
  const shown = site.saes[Number(sae)];
  return el("section", { class: "card", id: "owner" }, el("h2", {}, `Whose: ${whose(page.brief.owner)}`),
    el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "part"), el("th", {}, "of"), el("th", { class: "num" }, "relative norm"))), el("tbody", {}, page.parts.map((/** @type {any} */ part, /** @type {number} */ m) =>
      el("tr", {}, el("th", { scope: "row" }, part.name), el("td", { class: "soft small" }, `${part.hook.split("/").at(-1)} of ${shown.parts[m].model}`), el("td", { class: "num" }, part.relative_norm.toFixed(3)))))),
    el("p", { class: "soft small" }, `The share of its decoder norm that is in a part: above 0.9 it is that part's only, shared if each has at least ${number(0.8 / page.parts.length)}.`));
}

/** @param {string} sae @param {any} page */
function neighbours(sae, page) {
  if (!page.cosine.length && !page.coactive.length) return "";
  return el("section", { class: "card" }, el("h2", {}, "Neighbours by direction"), table(sae, page.cosine, "cosine"),
    page.coactive.length ? [el("h2", {}, "Latents that fire at the same positions"), table(sae, page.coactive, "together")] : "");
}

/** How to show the latent on another page. @param {string} sae @param {any} page */
function embedding(sae, page) {
  const url = new URL(`/embed/${sae}/${page.latent}`, location.href).href;
  return el("details", { class: "card" }, el("summary", {}, "Show it on another page"),
    field("An iframe, for pages and notebooks on this machine", el("input", { readonly: true, name: "embed", value: `<iframe src="${url}" title="Latent ${page.latent}" width="100%" height="420"></iframe>`, onfocus: (/** @type {any} */ event) => event.target.select() })),
    el("p", { class: "soft small" }, el("a", { href: url, target: "_blank", rel: "noopener" }, "The page alone"), "; a notebook has ", el("code", {}, "winnow.Latents.show"), ", which needs no server."));
}
