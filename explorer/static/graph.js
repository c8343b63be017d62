// An attribution graph: which latents led to a prediction, and through which others. The address holds the state.
import { ask, get, go, remember } from "./api.js";
import { chart, plain } from "./canvas.js";
import { card, percentage, place, says } from "./card.js";
import { FEATURE, LOGIT, circuit, influence, joined, layout, of, ordered, prune } from "./circuit.js";
import { el, field, hideTip, number, select, showTip, waiting } from "./dom.js";
import { editForm } from "./edits.js";

const LISTED = 10;
const MAX_GROUPS = 40;

/** Groups as the address holds them, `[["name", "id", "id"], ...]` as in Neuronpedia's. @param {any} raw @returns {import("./circuit.js").Group[]} */
function parseGroups(raw) {
  try {
    const found = typeof raw === "string" ? JSON.parse(raw) : raw;
    if (!Array.isArray(found)) return [];
    return found.filter((one) => Array.isArray(one) && one.length > 1 && one.every((/** @type {any} */ each) => typeof each === "string"))
      .slice(0, MAX_GROUPS).map(([name, ...ids]) => ({ name: name.slice(0, 60) || "group", ids }));
  } catch { return []; }
}
/** @param {import("./circuit.js").Group[]} groups */
const written = (groups) => JSON.stringify(groups.map((one) => [one.name, ...one.ids]));
/** A share from the address. @param {string|undefined} text @param {number} otherwise */
const share = (text, otherwise) => { const value = Number(text); return text && value > 0 && value <= 1 ? value : otherwise; };

/** @param {any} site @param {Record<string, string>} fields */
export async function graphPage(site, fields) {
  const all = await get("graphs"), shown = all.filter((/** @type {any} */ one) => !one.problem);
  const broken = all.filter((/** @type {any} */ one) => one.problem).map((/** @type {any} */ one) => el("p", { class: "error" }, `${plain(one.name, 80)}: ${one.problem}`));
  if (!shown.length) return [el("h1", {}, "Circuits"), el("p", { class: "note" }, "There is no graph yet. `winnow circuit SET --prompt \"...\"` traces one into SET/graphs; reload this page then."), ...broken];
  const name = fields.graph ?? shown[0].name;
  const chooser = shown.length > 1 && field("Graph", select("graph", shown.map((/** @type {any} */ one) => [one.name, `${plain(one.name, 40)}: ${plain(one.prompt, 60)}`]), name, (graph) => go({ page: "graph", graph })));
  const body = el("div");
  waiting(body, "Reading the graph…", async () => show(site, await get(`graphs/${encodeURIComponent(name)}`), fields));
  return [el("div", { class: "head" }, el("h1", {}, "Circuit"), chooser), ...broken, body];
}

/** @param {any} site @param {any} sent @param {Record<string, string>} fields */
function show(site, sent, fields) {
  const graph = circuit(sent), whole = influence(graph), order = ordered(whole.link);
  const now = { nodes: share(fields.nodes, 0.8), links: share(fields.links, 0.98), groups: parseGroups(fields.supernodes ?? sent.supernodes) };
  const own = Float64Array.from(whole.node, (value, i) => (graph.nodes.kind[i] === LOGIT ? graph.nodes.probability[i] : value));
  /** @type {ReturnType<typeof layout>} */ let placed;
  /** @type {ReturnType<typeof joined>} */ let links;
  /** @type {Set<number>} */ const chosen = new Set(); // nodes, to be gathered
  let pinned = graph.number.get(fields.pinned ?? "") ?? -1, hovered = -1;
  const last = Math.max(...graph.rank);

  const panel = el("section", { class: "card node", "aria-label": "The node" }), counts = el("span", { class: "soft small num counts" }), edits = el("div");
  const markOf = (/** @type {number} */ i) => (i < 0 ? -1 : placed.owner[i]);
  const markSays = (/** @type {number} */ m) => placed.marks[m].name ?? says(graph, placed.marks[m].nodes[0]);
  const markPlace = (/** @type {number} */ m) => (placed.marks[m].name === null ? place(graph, placed.marks[m].nodes[0]) : `group of ${placed.marks[m].nodes.length} nodes`);

  const view = chart({
    label: `Attribution graph of ${graph.count.toLocaleString("en")} nodes. Arrow keys move between nodes, Enter pins one, Space chooses one for a group, plus and minus zoom, 0 shows all.`,
    tokens: graph.tokens,
    says: (m) => (placed.marks[m].name !== null || placed.marks[m].kind === LOGIT || graph.nodes.label[placed.marks[m].nodes[0]] ? markSays(m) : ""),
    rowName: (layer) => (layer < 0 ? "emb." : layer === last ? "logits" : `L${layer}`),
    over: (m, x, y) => {
      if (m < 0) hideTip(); else showTip(`${plain(markSays(m), 80)}\n${markPlace(m)} · ${percentage(placed.marks[m].influence)}`, x, y);
      const node = m < 0 ? -1 : placed.marks[m].nodes[0];
      if (node !== hovered) { hovered = node; later(); }
    },
    pick: (m, more) => {
      if (m >= 0 && more) { for (const i of placed.marks[m].nodes) chosen.has(i) ? chosen.delete(i) : chosen.add(i); } else pin(m < 0 ? -1 : placed.marks[m].nodes[0]);
      marked();
      describe();
    },
    moved: (at) => remember({ view: at || undefined }),
  });

  let timer = 0;
  // A pointer that only passes by asks the server for nothing.
  // Who has moved on into the panel, by Tab or to type a name, keeps what is there.
  const later = () => { clearTimeout(timer); timer = window.setTimeout(() => panel.contains(document.activeElement) || describe(), 120); };
  const marked = () => view.pin(markOf(pinned), new Set([...chosen].map(markOf).filter((m) => m >= 0)));
  const pin = (/** @type {number} */ i) => {
    pinned = i;
    remember({ pinned: i < 0 ? undefined : graph.nodes.id[i] });
    marked();
    describe();
  };

  /** @param {boolean} [keep] whether the view stays @param {() => void} [panels] what brings the panel up to date */
  function redraw(keep = true, panels = describe) {
    const kept = prune(graph, whole, now.nodes, now.links);
    placed = layout(graph, kept.nodes, own, now.groups);
    links = joined(graph, kept.links, whole.link, order, placed.marks, placed.owner);
    counts.textContent = `${kept.nodes.reduce((sum, one) => sum + one, 0).toLocaleString("en")} of ${graph.count.toLocaleString("en")} nodes, ${kept.links.reduce((sum, one) => sum + one, 0).toLocaleString("en")} of ${graph.weight.length.toLocaleString("en")} links`;
    view.show(placed, links, keep ? undefined : fields.view ?? "");
    marked();
    panels();
  }

  /** A line of a list of marks: click pins it. @param {number} m @param {any[]} figure */
  const line = (m, figure) => el("li", {}, el("button", { type: "button", class: "plain", onclick: () => pin(placed.marks[m].nodes[0]), onmouseenter: () => view.light(m), onmouseleave: () => view.light(-1) },
    el("span", {}, el("b", {}, plain(markSays(m), 60)), el("span", { class: "soft small" }, ` ${markPlace(m)}`)), el("span", { class: "num small" }, figure)));

  /** The strongest links of a mark on one side. @param {number} m @param {boolean} inputs */
  function strongest(m, inputs) {
    // In the order of the links, the most influential first: weights of different targets have different units.
    const list = of(inputs ? links.into : links.outOf, m);
    if (!list.length) return el("p", { class: "soft small" }, "none shown");
    return el("ul", { class: "plain links" }, [...list.subarray(0, LISTED)].map((e) => {
      const bar = el("i", { class: links.effect[e] < 0 ? "down" : "" });
      bar.style.setProperty("--w", String(links.influence[e] / links.influence[list[0]]));
      return line(inputs ? links.source[e] : links.target[e], [bar, `${links.effect[e] < 0 ? "−" : "+"}${number(Math.abs(links.effect[e]))}`]);
    }), list.length > LISTED && el("li", { class: "soft small" }, `and ${list.length - LISTED} weaker`));
  }

  function describe() {
    const i = hovered >= 0 ? hovered : pinned, m = markOf(i);
    if (m < 0) { panel.replaceChildren(...overview()); return; }
    const mark = placed.marks[m], details = el("div");
    const group = mark.name !== null && el("div", {}, el("p", { class: "soft small" }, "A group; its links are the sums of its nodes' links."),
      el("ul", { class: "plain" }, mark.nodes.map((each) => el("li", {}, says(graph, each), " ", el("span", { class: "soft small" }, place(graph, each))))),
      hovered < 0 && el("button", { type: "button", class: "quiet", onclick: () => { now.groups = now.groups.filter((one) => one.name !== mark.name); saveGroups(); } }, "Ungroup"));
    panel.replaceChildren(
      el("h2", {}, plain(markSays(m), 120)), el("p", { class: "soft small" }, markPlace(m)),
      group || details,
      ...(hovered >= 0 && hovered !== pinned ? [el("p", { class: "soft small" }, "Click, or Enter, pins it."), chosen.size ? gather() : ""] : [
        gather(), el("h3", {}, "Strongest inputs"), strongest(m, true), el("h3", {}, "Strongest outputs"), strongest(m, false),
        el("button", { type: "button", class: "quiet", onclick: () => pin(-1) }, "Unpin")]));
    if (!group) waiting(details, "Reading the latent…", () => card(graph, sent, i, own[i]).then((made) => made.flat().filter(Boolean)));
    if (hovered < 0) edits.replaceChildren(...(graph.nodes.kind[i] === FEATURE && !group ? editForm(site, sent, graph, i) : []));
  }

  /** Without a node: what helps to begin. */
  function overview() {
    edits.replaceChildren();
    const best = [...placed.marks.keys()].filter((m) => placed.marks[m].kind === FEATURE).sort((a, b) => placed.marks[b].influence - placed.marks[a].influence).slice(0, LISTED);
    return [el("h2", {}, "Most influential latents"), chosen.size ? gather() : "",
      el("ul", { class: "plain links" }, best.map((m) => line(m, [percentage(placed.marks[m].influence)]))),
      el("p", { class: "soft small" }, "Hover or move with the arrow keys to read a node; click or Enter pins it and lists its links; Shift and click, or Space, chooses several to gather under a name.")];
  }

  function saveGroups() {
    remember({ supernodes: now.groups.length ? written(now.groups) : "[]" });
    chosen.clear();
    redraw();
  }

  /** The form that gathers the chosen nodes, or the pinned one, under a name. */
  function gather() {
    const members = chosen.size ? [...chosen] : pinned >= 0 ? [pinned] : [];
    const name = el("input", { name: "group", maxlength: 60, required: true, placeholder: "a name", list: "groups", autocomplete: "off" });
    return el("form", { class: "bar gather", onsubmit: (/** @type {Event} */ event) => {
      event.preventDefault();
      const ids = members.map((i) => graph.nodes.id[i]);
      now.groups = now.groups.map((one) => ({ name: one.name, ids: one.ids.filter((id) => !ids.includes(id)) })).filter((one) => one.ids.length);
      const there = now.groups.find((one) => one.name === name.value);
      if (there) there.ids.push(...ids); else if (now.groups.length < MAX_GROUPS) now.groups.push({ name: name.value, ids });
      pinned = members[0];
      saveGroups();
    } }, field(members.length > 1 ? `Gather ${members.length} nodes under` : "Gather it under", name), el("datalist", { id: "groups" }, now.groups.map((one) => el("option", { value: one.name }))), el("button", { class: "quiet" }, "Gather"));
  }

  async function download() {
    const file = await (await ask(`graphs/${encodeURIComponent(sent.name)}/file`)).json();
    file.qParams = { ...file.qParams, supernodes: now.groups.map((one) => [one.name, ...one.ids]), pinnedIds: pinned >= 0 ? [graph.nodes.id[pinned]] : [], clickedId: pinned >= 0 ? graph.nodes.id[pinned] : "" };
    const href = URL.createObjectURL(new Blob([JSON.stringify(file)], { type: "application/json" }));
    el("a", { href, download: `${sent.name}.json` }).click();
    URL.revokeObjectURL(href);
  }

  const slider = (/** @type {"nodes"|"links"} */ what, /** @type {string} */ label) => {
    const says = el("output", {}, `${Math.round(100 * now[what])} %`);
    return el("label", { class: "field slider" }, el("span", {}, label, " ", says), el("input", { type: "range", name: what, min: what === "nodes" ? 0.05 : 0.5, max: 1, step: 0.01, value: now[what], oninput: (/** @type {any} */ event) => {
      now[what] = Number(event.target.value);
      says.textContent = `${Math.round(100 * now[what])} %`;
      queue();
    }, onchange: () => remember({ nodes: now.nodes, links: now.links }) }));
  };
  let queued = false, took = 0;
  // A slider fires more often than the screen is drawn. What takes long leaves as long to frames in between.
  const queue = () => {
    if (queued) return;
    queued = true;
    setTimeout(() => requestAnimationFrame(() => {
      const start = performance.now();
      queued = false;
      redraw(true, later);
      took = performance.now() - start;
    }), took > 12 ? took : 0);
  };

  const tool = (/** @type {string} */ text, /** @type {string} */ label, /** @type {() => void} */ run) => el("button", { type: "button", class: "quiet", "aria-label": label, title: label, onclick: run }, text);
  const stage = el("div", { class: "stage" }, view.canvas);
  /** @type {any} */ (stage).view = { ...view, mark: (/** @type {string} */ id) => markOf(graph.number.get(id) ?? -1), graph, influence: whole };
  const legend = el("div", { class: "keys small soft" }, key("feature", "latent"), key("error", "error: what the set loses"), key("embedding", "embedding"), key("logit", "logit"), el("span", {}, el("i", { class: "line" }), "raises"), el("span", {}, el("i", { class: "line down" }), "lowers"));
  const scores = sent.scores ? `replacement ${number(sent.scores.replacement)}, completeness ${number(sent.scores.completeness)}. ` : "";
  queueMicrotask(() => redraw(false));
  return [
    el("p", { class: "prompt" }, graph.tokens.map((word) => el("span", {}, plain(word, 60)))),
    sent.other_set && el("p", { class: "note" }, `No examples are shown: ${sent.other_set}`),
    el("div", { class: "bar" }, slider("nodes", "Nodes: share of influence"), slider("links", "Links: share of influence"),
      el("div", { class: "row" }, tool("−", "Zoom out", () => view.scale(1 / 1.4)), tool("+", "Zoom in", () => view.scale(1.4)), tool("All", "Show all", () => view.fit()), tool("Download", "Download the graph with its groups", download)), counts),
    el("div", { class: "columns graph" }, el("div", {}, el("div", { class: "card" }, stage, legend),
      el("p", { class: "soft small" }, scores, "Influence is computed here from the links of the file", sent.threshold ? `, which was pruned to ${number(sent.threshold)} of it before` : "", ". A mark's area is its influence; a link's bar is its influence, its number the direct effect of its source on its target. Pinch, or Ctrl and the wheel, zooms.")), panel, edits),
  ];
}

/** @param {string} kind @param {string} text */
const key = (kind, text) => el("span", {}, el("i", { class: `is-${kind}` }), text);
