// A worker that strokes the links of a graph into a picture. Without a GPU 50,000 lines take up to a second, which
// must not stop the page: it moves the last picture meanwhile.

/** @typedef {{x: Float64Array, y: Float64Array, source: Uint32Array, target: Uint32Array, effect: Float64Array, influence: Float64Array}} Content */
/** @typedef {{id: number, content?: Content, width: number, height: number, dots: number, ax: number, ay: number, dx: number, dy: number, raises: string, lowers: string}} Job */

const CHUNK = 1500; // links between looks for a newer job
const BATCH = 192; // hairlines per path: longer paths take the rasteriser more than their share
const ALIKE = 0.85; // links of a path have at least this share of its first one's influence

/** @type {Content} */ let links;
/** @type {Job|null} */ let waiting = null;
let busy = false;
const canvas = new OffscreenCanvas(1, 1), pen = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));

addEventListener("message", async (/** @type {MessageEvent<Job>} */ event) => {
  // A job that was never begun hands its links on to the one that takes its place.
  waiting = { content: waiting?.content, ...event.data };
  if (busy) return;
  busy = true;
  while (waiting) { const job = /** @type {Job} */ (waiting); waiting = null; await work(job); }
  busy = false;
});

/** @param {Job} job */
async function work(job) {
  if (job.content) links = job.content;
  canvas.width = job.width * job.dots; // which clears it
  canvas.height = job.height * job.dots;
  pen.setTransform(job.dots, 0, 0, job.dots, 0, 0);
  // The strongest come first, so that an unfinished picture already shows them; later ones go below.
  pen.globalCompositeOperation = "destination-over";
  const count = links.source.length;
  for (let from = 0; from < count; from += CHUNK) {
    stroke(job, from, Math.min(count, from + CHUNK));
    if (from === 0 && job.content && count > CHUNK) send(job, await createImageBitmap(canvas), false);
    await new Promise((resolve) => setTimeout(resolve));
    if (waiting) return;
  }
  send(job, canvas.transferToImageBitmap(), true);
}

/** @param {Job} job @param {ImageBitmap} image @param {boolean} whole */
const send = (job, image, whole) => /** @type {any} */ (self).postMessage({ id: job.id, image, whole }, [image]);

/** @param {Job} job @param {number} from @param {number} to */
function stroke(job, from, to) {
  const most = Math.sqrt(links.influence[0] || 1);
  while (from < to) {
    const strength = Math.sqrt(links.influence[from]) / most, least = links.influence[from] * ALIKE, wide = 0.6 + 3 * strength;
    // A path of thick lines costs many times what its lines cost alone; a path of hairlines does not.
    const batch = wide > 1 ? 1 : BATCH;
    let end = from + 1;
    while (end < to && end < from + batch && links.influence[end] >= least) end++;
    for (const lowers of [false, true]) {
      let any = false;
      pen.beginPath();
      for (let e = from; e < end; e++) {
        if (links.effect[e] < 0 !== lowers) continue;
        const a = links.source[e], b = links.target[e];
        pen.moveTo(links.x[a] * job.ax + job.dx, job.dy - links.y[a] * job.ay);
        pen.lineTo(links.x[b] * job.ax + job.dx, job.dy - links.y[b] * job.ay);
        any = true;
      }
      if (!any) continue;
      pen.strokeStyle = lowers ? job.lowers : job.raises;
      pen.globalAlpha = Math.min(0.75, 0.04 + 0.8 * strength);
      pen.lineWidth = wide;
      pen.stroke();
    }
    from = end;
  }
}
