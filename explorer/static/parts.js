// Changes of latents as addresses hold them, and the parts of a crosscoder in which they are made.

/** @typedef {{sae: number, latent: number, op: string, strength: number, part: string}} Edit */
/** @param {Edit[]} edits */
export const written = (edits) => edits.map((one) => [one.sae, one.latent, one.op, one.strength, ...(one.part ? [one.part] : [])].join(":")).join(",");
/** The names of a crosscoder's parts; none of another SAE. @param {import("./main.js").Site} site @param {number} sae */
export const partsOf = (site, sae) => (site.saes[sae]?.parts ?? []).map((part) => part.name);
/** An edit that its SAE takes: codes of a crosscoder need the rows of all parts, so that only `add` is left, in one part. @param {import("./main.js").Site} site @param {Edit} edit */
export const fit = (site, edit) => {
  const names = partsOf(site, edit.sae);
  edit.part = names.length && !names.includes(edit.part) ? names[0] : names.length ? edit.part : "";
  if (names.length) edit.op = "add";
  return edit;
};
/** A strength to begin with: twice the latent's largest activation, which depends on the SAE's units; a factor of 2. @param {string} op @param {{largest: number}} brief */
export const strong = (op, brief) => (op === "scale" ? 2 : Number((2 * brief.largest).toPrecision(3)));
/** The address's text for steering with a latent at twice its largest activation; of a crosscoder in the part with its longest decoder row. @param {import("./main.js").Site} site @param {string} sae @param {any} brief */
export const steerWith = (site, sae, brief) => {
  const names = partsOf(site, Number(sae)), part = names[(brief.norms ?? []).indexOf(Math.max(...(brief.norms ?? [])))] ?? "";
  return written([fit(site, { sae: Number(sae), latent: brief.latent, op: "clamp", strength: strong("clamp", brief), part })]);
};
