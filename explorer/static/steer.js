// The steering bench: the same prompt and the same random numbers, clean and steered side by side, as generated.
import { ask, get, remember } from "./api.js";
import { el, field, number, select } from "./dom.js";
import { begins, slow } from "./text.js";
import { fit, partsOf, written, strong } from "./parts.js";
import { about, link } from "./tokens.js";

/** @typedef {import("./parts.js").Edit} Edit */
const OPS = /** @type {[string, string][]} */ ([["clamp", "clamp to"], ["scale", "scale by"], ["add", "add"], ["ablate", "ablate"]]);

/** @param {string} [text] @returns {Edit[]} */
const parse = (text) => (text ?? "").split(",").filter(Boolean).map((one) => {
  const [sae, latent, op, strength, part] = one.split(":");
  return { sae: Number(sae) || 0, latent: Number(latent) || 0, op: OPS.some(([name]) => name === op) ? op : "clamp", strength: Number(strength) || 0, part: part ?? "" };
});

/** @param {import("./main.js").Site} site @param {Record<string, string>} fields */
export function steerPage(site, fields) {
  const edits = parse(fields.edits ?? "0:0:clamp:1").map((edit) => fit(site, edit));
  // Those whose strength somebody chose; of the others it follows latent and operation.
  const chosen = new WeakSet(fields.edits === undefined ? [] : edits);
  const now = { prompt: "The king said to his", tokens: "40", temperature: "0.8", seed: "0", ...fields };
  const list = el("div"), status = el("p", { class: "soft small", role: "status" });
  const clean = el("p", { class: "out", role: "log", "aria-label": "Clean" }), steered = el("p", { class: "out", role: "log", "aria-label": "Steered" });
  const prompt = el("textarea", { name: "prompt", maxlength: site.limits.text, required: true }, now.prompt);
  const box = (/** @type {string} */ name, /** @type {number} */ low, /** @type {number} */ high, /** @type {string} */ step) => el("input", { type: "number", name, min: low, max: high, step, required: true, value: /** @type {any} */ (now)[name] });
  const tokens = box("tokens", 1, site.limits.new_tokens, "1"), temperature = box("temperature", 0, 5, "0.1"), seed = box("seed", 0, 2 ** 31 - 1, "1");
  /** @type {AbortController|null} */ let running = null;

  const save = () => remember({ prompt: prompt.value, tokens: tokens.value, temperature: temperature.value, seed: seed.value, edits: written(edits) });
  const draw = () => list.replaceChildren(...edits.map((edit, i) => {
    const says = el("div", { class: "says small" });
    const name = async () => {
      try {
        const brief = await get(`saes/${edit.sae}/brief/${edit.latent}`);
        says.replaceChildren(link(edit.sae, edit.latent), "  ", ...about(brief), el("span", { class: "soft" }, `  largest seen ${number(brief.largest)}`));
        if (!chosen.has(edit)) strength.value = String(edit.strength = strong(edit.op, brief));
      } catch (error) { says.replaceChildren(el("span", { class: "soft" }, error instanceof Error ? error.message : "")); }
    };
    name();
    const strength = el("input", { type: "number", step: "any", min: -10000, max: 10000, value: edit.strength, disabled: edit.op === "ablate", onchange: (/** @type {any} */ event) => { edit.strength = Number(event.target.value) || 0; chosen.add(edit); save(); } });
    return el("div", { class: "edit" },
      site.saes.length > 1 && field("SAE", select("sae", site.saes.map((sae, k) => [String(k), sae.name]), String(edit.sae), (value) => { edit.sae = Number(value); fit(site, edit); save(); draw(); })),
      field("Latent", el("input", { type: "number", min: 0, max: site.saes[edit.sae]?.latents - 1, value: edit.latent, onchange: (/** @type {any} */ event) => { edit.latent = Number(event.target.value) || 0; save(); name(); } })),
      edit.part && field("Part", select("part", partsOf(site, edit.sae).map((part) => [part, part]), edit.part, (value) => { edit.part = value; save(); })),
      field("Do", select("op", edit.part ? OPS.filter(([op]) => op === "add") : OPS, edit.op, (value) => { edit.op = value; save(); draw(); })), field("Strength", strength),
      el("button", { type: "button", class: "quiet", "aria-label": `Remove the change of latent ${edit.latent}`, onclick: () => { edits.splice(i, 1); save(); draw(); } }, "Remove"), says);
  }));

  const run = async () => {
    save();
    running?.abort();
    const mine = (running = new AbortController());
    stop.disabled = false;
    for (const out of [clean, steered]) out.replaceChildren(el("span", { class: "prompt" }, prompt.value));
    status.className = "soft small";
    status.textContent = slow(site, "Waiting for the first token…");
    const sums = { clean: [0, 0], steered: [0, 0] };
    try {
      const reply = await ask("steer", { prompt: prompt.value, edits, tokens: Number(tokens.value), temperature: Number(temperature.value), seed: Number(seed.value) }, mine.signal);
      site.subject.ready = true;
      const reader = /** @type {ReadableStream} */ (reply.body).pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", ended = false; !ended;) {
        const { value, done } = await reader.read();
        const lines = (rest + (value ?? "")).split("\n");
        rest = /** @type {string} */ (lines.pop());
        for (const line of lines) {
          const one = JSON.parse(line);
          if (one.done) { ended = true; break; }
          (one.run === "clean" ? clean : steered).append(one.text);
          const sum = sums[/** @type {"clean"|"steered"} */ (one.run)];
          sum[0] += one.logprob; sum[1] += 1;
          status.textContent = `Generating: ${sums.steered[1]} of ${tokens.value} tokens`;
        }
        if (done) break;
      }
      status.textContent = `${sums.clean[1]} clean and ${sums.steered[1]} steered tokens; mean log-probability ${number(sums.clean[0] / Math.max(1, sums.clean[1]))} and ${number(sums.steered[0] / Math.max(1, sums.steered[1]))} nats, each in its own run.`;
    } catch (error) {
      if (mine.signal.aborted) { if (running === mine) status.textContent = "Stopped."; return; }
      status.className = "error";
      status.textContent = error instanceof Error ? error.message : String(error);
    } finally { if (running === mine) stop.disabled = true; }
  };
  const stop = el("button", { type: "button", class: "quiet", disabled: true, onclick: () => running?.abort() }, "Stop");
  draw();
  return [
    el("div", { class: "head" }, el("h1", {}, "Steering bench"), el("span", { class: "soft" }, `The same prompt and the same random numbers through ${site.subject.model}, twice. ${begins(site)}`)),
    el("form", { class: "card", onsubmit: (/** @type {Event} */ event) => { event.preventDefault(); run(); } },
      field("Prompt", prompt), list,
      el("div", { class: "row" }, el("button", { type: "button", class: "quiet", onclick: () => { if (edits.length < 8) { edits.push(fit(site, { sae: 0, latent: 0, op: "clamp", strength: 1, part: "" })); save(); draw(); } } }, "Add a change")),
      el("div", { class: "bar" }, field("Tokens", tokens), field("Temperature", temperature), field("Seed", seed), el("button", {}, "Generate"), stop)),
    status,
    el("div", { class: "pair" }, el("section", { class: "card" }, el("h2", {}, "Clean"), clean), el("section", { class: "card" }, el("h2", {}, "Steered"), steered)),
  ];
}
