// A change of one latent of a graph, run in the subject: what the graph's links foretell beside what is found.
import { get } from "./api.js";
import { el, field, level, select, waiting } from "./dom.js";
import { slow } from "./text.js";
import { token } from "./tokens.js";

/** @param {any} site @param {any} sent @param {import("./circuit.js").Circuit} graph @param {number} i */
export function editForm(site, sent, graph, i) {
  const { layer, latent, position, activation } = graph.nodes, now = { op: "ablate", strength: String(Number((2 * (activation[i] ?? 1)).toPrecision(3))) };
  const out = el("div", { "aria-live": "polite" }), head = el("h2", {}, `What if layer ${layer[i]}'s latent ${latent[i]} were different here?`);
  if (sent.no_edits) return [el("section", { class: "card" }, head, el("p", { class: "note" }, sent.no_edits))];
  const strength = el("input", { type: "number", name: "strength", step: "any", min: -10000, max: 10000, value: now.strength, disabled: true, required: true });
  const run = () => waiting(out, slow(site, "Running the prompt with and without the change…"), async () => {
    const edit = { layer: layer[i], latent: latent[i], position: position[i], op: now.op, strength: now.op === "ablate" ? 0 : Number(strength.value) };
    const found = await get(`graphs/${encodeURIComponent(sent.name)}/edit`, { edits: [edit] });
    site.subject.ready = true;
    return outcome(found.logits);
  });
  return [el("section", { class: "card" }, head,
    el("form", { class: "bar", onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); run(); } },
      field("Do", select("op", [["ablate", "take it away"], ["scale", "scale it by"], ["clamp", "clamp it to"]], now.op, (op) => { now.op = op; strength.disabled = op === "ablate"; })),
      field("Strength", strength), el("button", {}, "Run in the subject")), out)];
}

/** @param {{token: string, before: number, after: number, foretold: number, held: number, found: number}[]} logits */
function outcome(logits) {
  const most = Math.max(1e-9, ...logits.map((one) => Math.max(Math.abs(one.foretold), Math.abs(one.held), Math.abs(one.found))));
  const bar = (/** @type {number} */ value, kind = "num") => {
    const drawn = el("i", { class: value < 0 ? "down" : "" });
    drawn.style.setProperty("--w", String(Math.abs(value) / most));
    return el("td", { class: kind }, drawn, `${value > 0 ? "+" : value < 0 ? "−" : ""}${level(Math.abs(value))}`);
  };
  const share = (/** @type {number} */ value) => `${(100 * value).toFixed(1)} %`;
  return [el("div", { class: "scroll" }, el("table", { class: "outcome" },
    el("thead", {}, el("tr", {}, el("th", {}, "logit"), el("th", { class: "num" }, "foretold"), el("th", { class: "num wide" }, "replacement model"), el("th", { class: "num" }, "found"), el("th", { class: "num" }, "probability"), el("th", { class: "num" }, "with it"))),
    el("tbody", {}, logits.map((one) => el("tr", {}, el("td", {}, token(one.token)), bar(one.foretold), bar(one.held, "num wide"), bar(one.found), el("td", { class: "num" }, share(one.before)), el("td", { class: "num" }, share(one.after))))))),
  el("p", { class: "soft small" }, "Changes of the logits less their mean: foretold by the links of the graph; by the replacement model, in which later latents are computed anew; and found by running the subject with nothing held.")];
}
