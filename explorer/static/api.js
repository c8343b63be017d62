// The server's JSON API, and the address bar as the page's only state.

/** @typedef {{latent: number, density: number, largest: number, token_share: number, explanation: string|null, fires_on: string[], promotes: string[], score?: number, owner?: string, norms?: number[]}} Brief */

/** @param {string} path @param {any} [body] @param {AbortSignal} [signal] @returns {Promise<Response>} */
export async function ask(path, body, signal) {
  const options = body === undefined ? { signal } : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  /** @type {Response} */ let reply;
  try {
    reply = await fetch(`/api/${path}`, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Error("The server does not answer. Is `winnow explore` still running?");
  }
  if (reply.ok) return reply;
  const found = await reply.json().catch(() => ({}));
  const detail = Array.isArray(found.detail) ? found.detail.map((/** @type {any} */ one) => `${one.loc.slice(1).join(".")}: ${one.msg}`).join("; ") : found.detail;
  throw new Error(found.error ?? detail ?? `The server answered ${reply.status}`);
}

/** @param {string} path @param {any} [body] @returns {Promise<any>} */
export const get = async (path, body) => (await ask(path, body)).json();

/** @returns {Record<string, string>} */
export const state = () => Object.fromEntries(new URLSearchParams(location.search));

/** The address of a page. @param {Record<string, any>} fields */
export function address(fields) {
  const kept = Object.entries(fields).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return `?${new URLSearchParams(kept.map(([name, value]) => [name, String(value)]))}`;
}

/** Note changed fields in the address bar, without leaving the page. @param {Record<string, any>} fields */
export function remember(fields) {
  history.replaceState(null, "", address({ ...state(), ...fields }));
}

/** Go to another page. @param {Record<string, any>} fields */
export function go(fields) {
  history.pushState(null, "", address(fields));
  dispatchEvent(new PopStateEvent("popstate"));
}
