// The last seconds of the server, as they come: one place in a list for each second, also for those without news.

const COUNTS = ["tokens", "prefilled"];
const LATENCIES = ["ttft_ms", "token_ms"];
const LEVELS = ["running", "queued", "kv_reserved_bytes", "kv_in_use_bytes", "kv_budget_bytes"];
const KINDS = ["admission", "ended"];
const SPANS = [60, 120, 300];

export class Seconds {
  constructor() {
    this.forget();
  }

  forget() {
    this.boot = null;
    this.now = 0;
    this.kept = 300;
    this.known = new Map();
  }

  /** Take an answer of `/admin/live` in; another boot begins anew. */
  take({ boot, now, seconds_kept: kept, seconds }) {
    if (boot !== this.boot) {
      this.forget();
      this.boot = boot;
    }
    Object.assign(this, { now, kept });
    seconds.at.forEach((at, index) => {
      this.known.set(at, Object.fromEntries(Object.entries(seconds).map(([name, column]) => [name, column[index]])));
    });
    let newestOld = null;
    for (const at of this.known.keys()) {
      if (at > now - kept) continue;
      if (newestOld != null) this.known.delete(newestOld); // The last one before the window tells the levels it begins with.
      newestOld = at;
    }
  }

  /** How many seconds are worth showing: those of a server that has just started would be lost in five minutes. */
  get span() {
    const age = this.now - Math.min(this.now, ...this.known.keys());
    return SPANS.find((span) => age <= span && span <= this.kept) ?? this.kept;
  }

  /** One list for each number, of whole seconds, oldest first; the one that goes on is left out. */
  columns() {
    const found = {};
    const names = [...COUNTS, ...LEVELS, "queued_max"];
    for (const name of names) found[name] = [];
    for (const name of LATENCIES) found[name] = { p50: [], max: [] };
    for (const name of KINDS) found[name] = [];
    const begin = this.now - this.span;
    let levels = [...this.known.values()].findLast(({ at }) => at < begin) ?? null;
    for (let at = begin; at < this.now; at += 1) {
      const second = this.known.get(at);
      levels = second ?? levels;
      // Before the first second that is known there is nothing; after it, silence means that nothing was done.
      for (const name of COUNTS) found[name].push(second?.[name] ?? (levels && 0));
      for (const name of LEVELS) found[name].push(levels?.[name] ?? null);
      found.queued_max.push(second?.queued_max ?? levels?.queued ?? null);
      for (const name of LATENCIES) {
        found[name].p50.push(second?.[name]?.p50 ?? null);
        found[name].max.push(second?.[name]?.max ?? null);
      }
      for (const name of KINDS) found[name].push(second?.[name] ?? {});
    }
    return found;
  }
}
