// The server's endpoints. Addresses are relative to the page, so that they hold under any prefix.

const PATIENCE_MS = 10_000;

/** What the server refused, in its own words, or that it could not be reached (`status` 0). */
export class Refusal extends Error {
  constructor(message, { status = 0, code = "", param = null, retryAfterS = null, requestId = "" } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfterS, requestId });
  }
}

/** The JSON at `path`. Throws a `Refusal`. */
export async function ask(path, options = {}) {
  const response = await reach(path, { signal: AbortSignal.timeout(PATIENCE_MS), ...options });
  if (!response.ok) throw await refusalOf(response);
  return response.json();
}

/** Everything that a live view shows, for the seconds from `after` on. */
export const live = (after, limit) => ask(`admin/live?after=${after}&limit=${limit}`);
/** The executors in an answer of `/health`. What the model's preparation is called there counts until one is there. */
export const executorsOf = ({ executors }) => executors.filter(({ name }) => name !== "prepare" || executors.length === 1);
export const health = () => ask("health");
export const story = (id) => ask(`admin/requests/${encodeURIComponent(id)}/timeline`, { signal: AbortSignal.timeout(60_000) });
export const events = (id) => ask(`admin/requests/${encodeURIComponent(id)}/events`, { signal: AbortSignal.timeout(60_000) });
export const cancel = (id) => ask(`cancel/${encodeURIComponent(id)}`, { method: "POST" });
export const bundlePath = (id, content) => `admin/debug/bundle/${encodeURIComponent(id)}?content=${content}`;

/** Start a chat answer; resolves once the server has admitted it. Throws a `Refusal`; `AbortError` after an abort. */
export async function chat(body, requestId, signal) {
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Request-ID": requestId },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } }),
    signal,
  });
  if (!response.ok) throw await refusalOf(response);
  return { requestId: response.headers.get("X-Request-ID") || requestId, chunks: chunksOf(response) };
}

async function* chunksOf(response) {
  const requestId = response.headers.get("X-Request-ID") || "";
  const broken = () => new Refusal("The connection broke off before the answer was complete.", { requestId });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : broken();
    });
    if (done) throw broken(); // `[DONE]` comes last, always.
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ")) continue; // A comment keeps the connection alive.
      const data = frame.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(chunk.error.message, { ...chunk.error, requestId });
      yield chunk;
    }
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached.", { code: "unreachable" });
  }
}

async function refusalOf(response) {
  const said = await response.json().then((body) => body.error, () => null);
  const after = Number.parseFloat(response.headers.get("Retry-After"));
  return new Refusal(said?.message ?? `The server answered ${response.status} ${response.statusText}.`, {
    status: response.status,
    code: said?.code ?? "",
    param: said?.param ?? null,
    retryAfterS: Number.isFinite(after) ? after : null,
    requestId: response.headers.get("X-Request-ID") || "",
  });
}
