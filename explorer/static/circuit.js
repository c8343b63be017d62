// An attribution graph as numbers: influence, pruning, groups, and where every mark stands. Nothing here draws.

export const [EMBEDDING, ERROR, FEATURE, LOGIT] = [0, 1, 2, 3];

/** @typedef {{id: string[], kind: number[], layer: number[], position: number[], latent: (number|null)[], activation: (number|null)[], probability: number[], label: string[]}} Nodes */
/**
 * Links are sorted by nothing; `into` and `outOf` list the links of each node.
 * @typedef {{tokens: string[], nodes: Nodes, count: number, source: Uint32Array, target: Uint32Array, weight: Float32Array, into: Lists, outOf: Lists, rank: Int32Array, upward: Uint32Array, number: Map<string, number>}} Circuit
 */
/** Lists of numbers by number, end to end: those of i are all[start[i]] to all[start[i + 1]]. @typedef {{start: Uint32Array, all: Uint32Array}} Lists */
/** @typedef {{node: Float64Array, link: Float64Array}} Influence */
/** @typedef {{name: string, ids: string[]}} Group */
/** A mark is what is drawn: a node, or a group of nodes. @typedef {{nodes: number[], name: string|null, kind: number, layer: number, position: number, influence: number, x: number, y: number, r: number}} Mark */

/** @param {Uint32Array} of @param {number} count @returns {Lists} */
function lists(of, count) {
  const start = new Uint32Array(count + 1), all = new Uint32Array(of.length);
  for (const each of of) start[each + 1]++;
  for (let i = 0; i < count; i++) start[i + 1] += start[i];
  const next = start.slice();
  for (let i = 0; i < of.length; i++) all[next[of[i]]++] = i;
  return { start, all };
}

/** The numbers that belong to one. @param {Lists} lists @param {number} i */
export const of = (lists, i) => lists.all.subarray(lists.start[i], lists.start[i + 1]);

/** @param {any} sent what the server sent @returns {Circuit} */
export function circuit(sent) {
  const count = sent.nodes.id.length;
  const source = Uint32Array.from(sent.links.source), target = Uint32Array.from(sent.links.target);
  const rank = Int32Array.from(sent.nodes.layer);
  return {
    tokens: sent.tokens, nodes: sent.nodes, count, source, target, weight: Float32Array.from(sent.links.weight),
    into: lists(target, count), outOf: lists(source, count), rank,
    upward: Uint32Array.from(rank.keys()).sort((a, b) => rank[a] - rank[b] || a - b),
    number: new Map(sent.nodes.id.map((/** @type {string} */ id, /** @type {number} */ i) => [id, i])),
  };
}

/**
 * Influence on the logits, weighted by their probabilities, of every node and link (Ameisen, Lindsey et al. 2025):
 * each node shares what it has among its inputs in proportion to |weight|. One pass downward adds up all paths,
 * as (I - A)^-1 - I does, since links lead to higher layers only.
 * @param {Circuit} graph @param {Uint8Array} [keptNodes] @param {Uint8Array} [keptLinks] @returns {Influence}
 */
export function influence(graph, keptNodes, keptLinks) {
  const node = new Float64Array(graph.count), link = new Float64Array(graph.weight.length);
  const { source, weight, upward } = graph, { start, all } = graph.into, { kind, probability } = graph.nodes;
  const counts = (/** @type {number} */ e) => (!keptNodes || keptNodes[source[e]]) && (!keptLinks || keptLinks[e]);
  let mass = 0;
  for (let i = 0; i < graph.count; i++) if (kind[i] === LOGIT) mass += probability[i];
  for (let k = graph.count - 1; k >= 0; k--) {
    const i = upward[k], has = node[i] + (kind[i] === LOGIT ? probability[i] / (mass || 1) : 0);
    if (!has || (keptNodes && !keptNodes[i])) continue;
    let total = 0;
    for (let at = start[i]; at < start[i + 1]; at++) if (counts(all[at])) total += Math.abs(weight[all[at]]);
    if (!total) continue;
    for (let at = start[i]; at < start[i + 1]; at++) {
      const e = all[at];
      if (!counts(e)) continue;
      link[e] = (has * Math.abs(weight[e])) / total;
      node[source[e]] += link[e];
    }
  }
  return { node, link };
}

/** The largest values that together make up a share of the sum; ties are kept together. @param {Float64Array} values @param {number} share @param {(i: number) => boolean} among */
function largest(values, share, among) {
  const kept = new Uint8Array(values.length), sorted = new Float64Array(values.length);
  let count = 0, rest = 0;
  for (let i = 0; i < values.length; i++) if (values[i] > 0 && among(i)) { sorted[count++] = values[i]; rest += values[i]; }
  // Sorted as numbers, without a function that compares: 50,000 take 4 ms instead of 30.
  const ascending = sorted.subarray(0, count).sort();
  rest *= share;
  let at = count - 1;
  for (; at > 0; at--) if ((rest -= ascending[at]) <= 0 && share < 1) break;
  const least = share < 1 ? ascending[Math.max(0, at)] : 0;
  for (let i = 0; i < values.length; i++) if (values[i] > 0 && values[i] >= least && among(i)) kept[i] = 1;
  return kept;
}

/**
 * Keep the most influential nodes and links, as circuit-tracer prunes: nodes to a share of the influence on the
 * logits, then links to a share of what is left between them, then none that leads from nowhere or to nowhere.
 * @param {Circuit} graph @param {Influence} all @param {number} nodeShare @param {number} linkShare
 */
export function prune(graph, all, nodeShare, linkShare) {
  const { kind } = graph.nodes, { source, target, count } = graph;
  const nodes = largest(all.node, nodeShare, (i) => kind[i] !== LOGIT);
  const ends = (/** @type {number} */ i) => kind[i] === LOGIT || kind[i] === EMBEDDING;
  for (let i = 0; i < count; i++) if (ends(i)) nodes[i] = 1;
  const within = influence(graph, nodes);
  const links = largest(within.link, linkShare, (e) => !!nodes[source[e]] && !!nodes[target[e]]);
  const reaches = new Uint8Array(count), fed = new Uint8Array(count);
  for (let changed = true; changed;) {
    changed = false;
    reaches.fill(0);
    fed.fill(0);
    for (let e = 0; e < links.length; e++) {
      if (!nodes[source[e]] || !nodes[target[e]]) links[e] = 0;
      else if (links[e]) { reaches[source[e]] = 1; fed[target[e]] = 1; }
    }
    for (let i = 0; i < count; i++) {
      if (nodes[i] && !ends(i) && !(reaches[i] && (fed[i] || kind[i] === ERROR))) { nodes[i] = 0; changed = true; }
    }
  }
  return { nodes, links };
}

/**
 * Where marks stand: positions across, layers upward, as many columns in a cell as it needs. World units; a mark
 * has a place of 1 x 1, and y grows upward.
 * @param {Circuit} graph @param {Uint8Array} nodes those shown @param {Float64Array} weight what a mark's size shows @param {Group[]} groups
 */
export function layout(graph, nodes, weight, groups) {
  const owner = new Int32Array(graph.count).fill(-1);
  /** @type {Mark[]} */ const marks = [];
  const add = (/** @type {number[]} */ members, /** @type {string|null} */ name) => {
    const first = members.reduce((best, i) => (weight[i] > weight[best] ? i : best));
    for (const i of members) owner[i] = marks.length;
    marks.push({ nodes: members, name, kind: graph.nodes.kind[first], layer: graph.rank[first], position: graph.nodes.position[first], influence: members.reduce((sum, i) => sum + weight[i], 0), x: 0, y: 0, r: 0 });
  };
  for (const group of groups) {
    const members = group.ids.map((id) => graph.number.get(id) ?? -1).filter((i) => i >= 0 && nodes[i] && owner[i] < 0);
    if (members.length) add(members, group.name);
  }
  for (let i = 0; i < graph.count; i++) if (nodes[i] && owner[i] < 0) add([i], null);
  const rows = [...new Set(graph.rank)].sort((a, b) => a - b), rowOf = new Map(rows.map((layer, row) => [layer, row]));
  /** @type {Map<number, number[]>} */ const cells = new Map();
  for (let m = 0; m < marks.length; m++) {
    const cell = /** @type {number} */ (rowOf.get(marks[m].layer)) * graph.tokens.length + marks[m].position;
    if (!cells.has(cell)) cells.set(cell, []);
    /** @type {number[]} */ (cells.get(cell)).push(m);
  }
  const wide = new Float64Array(graph.tokens.length).fill(1), high = new Float64Array(rows.length).fill(1);
  // Logits stand below each other, close together, so that there is room for their words.
  const last = rows.length - 1, across = (/** @type {number} */ n, /** @type {number} */ row) => (row === last ? 1 : Math.max(1, Math.ceil(Math.sqrt(n * 1.7))));
  const step = (/** @type {number} */ row) => (row === last ? 0.75 : 1);
  for (const [cell, members] of cells) {
    const column = cell % graph.tokens.length, row = (cell - column) / graph.tokens.length, columns = across(members.length, row);
    wide[column] = Math.max(wide[column], columns);
    high[row] = Math.max(high[row], Math.ceil(members.length / columns) * step(row));
  }
  const left = edges(wide, 0.7), bottom = edges(high, 0.7);
  const most = Math.max(1e-12, ...marks.map((mark) => mark.influence));
  for (const [cell, members] of cells) {
    const column = cell % graph.tokens.length, row = (cell - column) / graph.tokens.length, columns = across(members.length, row);
    members.sort((a, b) => marks[b].influence - marks[a].influence || a - b);
    const lines = Math.ceil(members.length / columns);
    for (let k = 0; k < members.length; k++) {
      const mark = marks[members[k]], line = Math.floor(k / columns), inLine = Math.min(columns, members.length - line * columns);
      mark.x = (left[column] + left[column + 1]) / 2 + (k % columns) - (inLine - 1) / 2;
      mark.y = (bottom[row] + bottom[row + 1]) / 2 + ((lines - 1) / 2 - line) * step(row);
      // By area, so that a mark of twice the influence looks twice as large.
      mark.r = Math.max(0.1, 0.5 * Math.sqrt(mark.influence / most));
    }
  }
  return { marks, owner, rows, left, bottom, width: left[left.length - 1], height: bottom[bottom.length - 1] };
}

/** Where bands of these sizes begin, and where the last ends. @param {Float64Array} sizes @param {number} gap */
function edges(sizes, gap) {
  const found = new Float64Array(sizes.length + 1);
  for (let i = 0; i < sizes.length; i++) found[i + 1] = found[i] + sizes[i] + gap;
  return found;
}

/** Links in descending order of their influence. @param {Float64Array} influence */
export const ordered = (influence) => Uint32Array.from(influence.keys()).sort((a, b) => influence[b] - influence[a] || a - b);

/**
 * Links between marks, the most influential first; links of the same two marks are added up.
 * @param {Circuit} graph @param {Uint8Array} links those shown @param {Float64Array} weight their influence
 * @param {Uint32Array} order of all links, `ordered(weight)` @param {Mark[]} marks @param {Int32Array} owner
 */
export function joined(graph, links, weight, order, marks, owner) {
  /** @type {Map<number, number>} */ const sums = new Map();
  let source = new Uint32Array(links.length), target = new Uint32Array(links.length);
  let effect = new Float64Array(links.length), influence = new Float64Array(links.length), count = 0;
  for (const e of order) {
    const a = owner[graph.source[e]], b = owner[graph.target[e]];
    if (!links[e] || a === b) continue;
    const grouped = marks[a].name !== null || marks[b].name !== null, key = a * marks.length + b, at = grouped ? sums.get(key) : undefined;
    if (at !== undefined) { effect[at] += graph.weight[e]; influence[at] += weight[e]; continue; }
    if (grouped) sums.set(key, count);
    source[count] = a; target[count] = b; effect[count] = graph.weight[e]; influence[count] = weight[e];
    count++;
  }
  source = source.subarray(0, count); target = target.subarray(0, count);
  effect = effect.subarray(0, count); influence = influence.subarray(0, count);
  // Sums may belong further up than the link that began them.
  if (sums.size) {
    const again = ordered(influence);
    source = again.map((i) => source[i]); target = again.map((i) => target[i]);
    [effect, influence] = [effect, influence].map((values) => Float64Array.from(again, (i) => values[i]));
  }
  return { source, target, effect, influence, into: lists(target, marks.length), outOf: lists(source, marks.length) };
}

/** A grid over marks, for the one nearest to a point. @param {Mark[]} marks */
export function grid(marks) {
  /** @type {Map<string, number[]>} */ const cells = new Map();
  marks.forEach((mark, m) => {
    const key = `${Math.floor(mark.x)},${Math.floor(mark.y)}`;
    cells.has(key) ? /** @type {number[]} */ (cells.get(key)).push(m) : cells.set(key, [m]);
  });
  /** The nearest mark within `reach` pixels of a point, or -1. @param {number} x @param {number} y @param {number} reach @param {number} kx pixels per unit across @param {number} ky and upward */
  return (x, y, reach, kx, ky) => {
    let best = -1, least = reach;
    for (let i = Math.floor(x - reach / kx); i <= Math.floor(x + reach / kx); i++) {
      for (let j = Math.floor(y - reach / ky); j <= Math.floor(y + reach / ky); j++) {
        for (const m of cells.get(`${i},${j}`) ?? []) {
          const far = Math.hypot((marks[m].x - x) * kx, (marks[m].y - y) * ky);
          if (far <= least) { best = m; least = far; }
        }
      }
    }
    return best;
  };
}
