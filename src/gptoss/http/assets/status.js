// Whether the server is there and ready, in the header for all views. Asked seldom while all is well, never in a hidden tab.

import { executorsOf, health } from "./api.js";
import { h, number, say } from "./dom.js";

const WELL_EVERY_MS = 10_000;
const ILL_EVERY_MS = 1_000;

const by = (id) => document.getElementById(id);

export class Status {
  /** `ready` hears whether a message sent now would be served. */
  constructor(ready) {
    this.ready = ready;
    this.timer = 0;
    this.isWell = false;
    addEventListener("visibilitychange", () => this.look());
    addEventListener("online", () => this.look());
  }

  async look() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    try {
      this.tell(await health());
    } catch {
      this.tell(null);
    }
  }

  /** What `/health` said, from whomever asked; null when nobody answered. */
  tell(said) {
    this.isGone = said === null;
    this.isWell = Boolean(said?.ready);
    const [tone, words] = wordsOf(said);
    by("status").querySelector(".dot").className = `dot ${tone}`;
    say(by("status").querySelector(".what"), words);
    by("banner").hidden = !this.isGone;
    say(by("banner"), this.isGone ? "The server cannot be reached. This page goes on trying." : "");
    this.tellLoading(said);
    this.ready(this.isWell);
    clearTimeout(this.timer);
    if (!document.hidden) this.timer = setTimeout(() => this.look(), this.isWell ? WELL_EVERY_MS : ILL_EVERY_MS);
  }

  tellLoading(said) {
    const loading = by("loading");
    const isLoading = said && !said.ready && ["starting", "degraded"].includes(said.status);
    loading.hidden = !isLoading;
    by("ideas").hidden = Boolean(isLoading);
    if (!isLoading) return;
    const rows = executorsOf(said).map(({ name, state, stage, progress, reason }) => {
      const doing = state === "loading" ? `loading: ${stage}` : state;
      const share = progress == null ? "" : `${number(progress * 100)}%`;
      const bar = state !== "failed" && h("progress", { max: 1, value: progress, "aria-label": `${name}: ${doing}` });
      return h("div", { class: "load-row" }, h("span", {}, h("b", {}, name), ` ${doing}`), h("span", { class: "soft n" }, share), bar, reason && h("span", { class: "bad" }, reason));
    });
    loading.replaceChildren(h("p", {}, rows.length ? "The model is being loaded. You can write already." : said.reason), ...rows);
  }
}

function wordsOf(said) {
  if (!said) return ["bad", "unreachable"];
  if (said.ready) return said.status === "degraded" ? ["wait", `ready, degraded: ${troubles(said)}`] : ["ok", "ready"];
  const loading = executorsOf(said).find(({ state, progress }) => state === "loading" && progress != null);
  if (loading) return ["wait", `loading ${number(loading.progress * 100)}%`];
  return [said.status === "starting" ? "wait" : "bad", said.status === "starting" ? "starting" : `not ready: ${said.reason}`];
}

function troubles({ executors }) {
  const bad = executors.filter(({ state }) => state === "failed" || state === "restarting");
  return bad.map(({ name, state }) => `${name} ${state}`).join(", ");
}
