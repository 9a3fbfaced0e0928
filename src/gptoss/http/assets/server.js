// The operator's view: charts of the last minutes, executors, the newest requests. One question a second, and none while
// nobody looks.

import { executorsOf, live } from "./api.js";
import { Chart } from "./chart.js";
import { clock, h, many, number, say, size, took } from "./dom.js";
import { Seconds } from "./seconds.js";

const EVERY_MS = 1_000;
const GONE_EVERY_MS = 2_000;
const LISTED = 40;
const RATE_S = 10;
const OPEN = new Set(["received", "queued", "admitted", "running"]);
const WRONG = new Set(["failed", "rejected"]);
const ACTIONS = [
  ["accept", "decode"],
  ["shrink", "prefill"],
  ["route_multi", "preempted"],
  ["queue", "queue"],
  ["reject", "bad"],
];

const by = (id) => document.getElementById(id);

export class ServerView {
  /** `told` hears each answer's health, or that there was none. */
  constructor(told) {
    this.told = told;
    this.seconds = new Seconds();
    this.timer = 0;
    this.rows = new Map();
    this.executors = new Map();
    this.charts = makeCharts();
    by("charts").append(...Object.values(this.charts).map((chart) => chart.node));
    by("charts").hidden = true;
    by("filter").addEventListener("change", () => this.listRequests());
    addEventListener("visibilitychange", () => this.watch(this.isShown));
  }

  /** Begin or stop asking. */
  watch(isShown) {
    this.isShown = isShown;
    clearTimeout(this.timer);
    this.timer = 0;
    if (isShown && !document.hidden && !this.isAsking) this.look();
  }

  async look() {
    this.isAsking = true;
    let answer = null;
    try {
      answer = await live(Math.max(0, this.seconds.now - 1), LISTED);
      this.take(answer);
    } catch (error) {
      if (!("status" in error)) throw error;
    } finally {
      this.isAsking = false;
    }
    this.told(answer?.health ?? null);
    if (this.isShown && !document.hidden) this.timer = setTimeout(() => this.look(), answer ? EVERY_MS : GONE_EVERY_MS);
  }

  take(answer) {
    this.seconds.take(answer);
    by("server-empty").hidden = true;
    by("charts").hidden = false;
    drawCharts(this.charts, this.seconds.columns(), answer);
    this.listExecutors(answer);
    this.answered = answer;
    this.listRequests();
  }

  listExecutors({ health, memory }) {
    sync(by("executors"), this.executors, executorsOf(health), (one) => one.name, newExecutor, (cells, one) => {
      const { kv_reserved_bytes: reserved = 0, kv_budget_bytes: budget = 0 } = memory.executors[one.name] ?? {};
      const progress = one.progress == null ? "" : ` ${number(one.progress * 100)}%`;
      const doing = one.state === "loading" && one.stage ? `: ${one.stage}${progress}` : "";
      say(cells.name, one.name);
      say(cells.device, one.device && one.device !== one.name ? one.device : "");
      cells.state.className = `state ${one.state === "ready" ? "good" : one.state === "failed" ? "bad" : "warn"}`;
      say(cells.state, one.state + doing);
      say(cells.reason, one.reason);
      say(cells.running, number(one.running));
      say(cells.starts, number(one.incarnation + 1));
      cells.meter.max = budget || 1;
      cells.meter.value = reserved;
      say(cells.memory, budget ? `${size(reserved)} of ${size(budget)}` : "");
    });
  }

  listRequests() {
    if (!this.answered) return;
    const wanted = by("filter").querySelector(":checked").value;
    const found = this.answered.requests.filter(({ state }) =>
      wanted === "open" ? OPEN.has(state) : wanted === "wrong" ? WRONG.has(state) : true,
    );
    sync(by("requests"), this.rows, found, (one) => `${one.boot} ${one.request_id}`, newRow, fillRow);
    by("requests-empty").hidden = found.length > 0;
    say(by("requests-empty"), wanted === "all" ? "No request yet. The first one will stand here." : "None of the newest requests.");
  }
}

function makeCharts() {
  const speed = (value) => `${number(value)}/s`;
  return {
    tokens: new Chart({
      title: "Throughput",
      series: [
        { name: "prompts", kind: "line", color: "prefill" },
        { name: "generated", kind: "level", color: "decode" },
      ],
      unit: speed,
      least: 10,
    }),
    ttft: new Chart({
      title: "First token",
      hint: "From a request's arrival to its first token",
      series: [
        { name: "longest", kind: "dots", color: "queue" },
        { name: "median", kind: "line", color: "prefill" },
      ],
      unit: took,
      least: 10,
    }),
    token: new Chart({
      title: "Time per token",
      hint: "What a running stream waits for each of its tokens",
      series: [
        { name: "longest", kind: "dots", color: "queue" },
        { name: "median", kind: "line", color: "decode" },
      ],
      unit: took,
    }),
    load: new Chart({
      title: "Requests",
      series: [
        { name: "running", kind: "level", color: "decode" },
        { name: "queued", kind: "line", color: "queue" },
      ],
      unit: (value) => number(value),
      least: 2,
    }),
    memory: new Chart({
      title: "KV memory",
      series: [
        { name: "reserved", kind: "level", color: "prefill" },
        { name: "in use", kind: "line", color: "decode" },
      ],
      unit: size,
      least: 1024,
      base: 1024,
    }),
    admission: new Chart({
      title: "Admission",
      hint: "Decisions, in bars of five seconds",
      series: ACTIONS.map(([name, color]) => ({ name: name.replace("_", " "), kind: "bars", color })),
      unit: (value) => number(value),
      least: 2,
    }),
  };
}

function drawCharts(charts, columns, { stats, memory, now_unix_s: nowS }) {
  const endS = (nowS ?? Date.now() / 1000) - 1;
  const { ttft_ms: ttft } = stats.latency;
  const step = columns.token_ms.p50.findLast((value) => value != null);
  const decisions = Object.values(stats.admission).reduce((total, count) => total + count, 0);
  const prompt = sum(columns.prefilled.slice(-RATE_S)) / RATE_S;
  charts.tokens.show(
    [columns.prefilled, columns.tokens],
    endS,
    `${number(stats.tokens_per_s, stats.tokens_per_s < 10 ? 1 : 0)} tokens/s`,
    prompt >= 0.5 ? `and ${number(prompt)}/s of prompts` : `${number(stats.tokens.generated)} since the start`,
  );
  charts.ttft.show(
    [columns.ttft_ms.max, columns.ttft_ms.p50],
    endS,
    ttft.count ? took(ttft.p50) : "none yet",
    ttft.count ? `p95 ${took(ttft.p95)}; ${number(stats.cache_stats.hit_rate * 100)}% of prompts cached` : "",
  );
  charts.token.show([columns.token_ms.max, columns.token_ms.p50], endS, step == null ? "none yet" : took(step), step == null ? "" : "newest median");
  charts.load.show([columns.running, columns.queued_max], endS, `${number(stats.running)} running`, `${number(stats.queued)} queued`);
  charts.memory.show(
    [columns.kv_reserved_bytes, columns.kv_in_use_bytes],
    endS,
    `${number(memory.memory_pressure * 100)}% reserved`,
    memory.kv_budget_bytes ? `of ${size(memory.kv_budget_bytes)}` : "",
  );
  charts.admission.show(
    ACTIONS.map(([action]) => columns.admission.map((second) => second[action] ?? 0)),
    endS,
    many(decisions, "decision"),
    [["queue", "queued"], ["shrink", "shrunk"], ["reject", "refused"]]
      .map(([action, word]) => stats.admission[action] && `${number(stats.admission[action])} ${word}`)
      .filter(Boolean)
      .join(", "),
  );
}

const sum = (values) => values.reduce((total, value) => total + (value ?? 0), 0);

/** Rows in the order of `items`, made once for each key and filled each time, so that focus and scrolling stay. */
function sync(body, rows, items, keyOf, make, fill) {
  const kept = new Set();
  let place = body.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    if (kept.has(key)) continue;
    kept.add(key);
    if (!rows.has(key)) rows.set(key, make(item));
    const { node, cells } = rows.get(key);
    fill(cells, item, node);
    if (node === place) place = place.nextElementSibling;
    else body.insertBefore(node, place);
  }
  for (const [key, { node }] of rows) {
    if (kept.has(key)) continue;
    node.remove();
    rows.delete(key);
  }
}

function newExecutor() {
  const cells = {
    name: h("b"),
    device: h("span", { class: "soft" }),
    state: h("span", { class: "state" }),
    reason: h("span", { class: "soft" }),
    running: h("td", { class: "n" }),
    starts: h("td", { class: "n opt" }),
    meter: h("meter", { min: 0, "aria-label": "KV memory reserved" }),
    memory: h("td", { class: "n" }),
  };
  const node = h(
    "tr",
    {},
    h("th", { scope: "row" }, cells.name, " ", cells.device),
    h("td", {}, cells.state, " ", cells.reason),
    cells.running,
    cells.starts,
    h("td", { class: "wide" }, cells.meter),
    cells.memory,
  );
  return { node, cells };
}

function newRow({ request_id: id }) {
  const names = ["at", "state", "decision", "executor", "queue", "ttft", "total", "speed", "prompt", "cached", "output"];
  const optional = new Set(["executor", "queue", "speed", "prompt", "cached"]);
  const words = new Set(["at", "state", "decision", "executor"]);
  const cells = Object.fromEntries(
    names.map((name) => [name, h("td", { class: [words.has(name) ? "nowrap" : "n", optional.has(name) ? "opt" : ""].join(" ").trim() })]),
  );
  const link = h("a", { href: `#server/${encodeURIComponent(id)}`, title: id }, id);
  const [first, ...rest] = names;
  const node = h("tr", {}, cells[first], h("th", { scope: "row", class: "mono" }, link), rest.map((name) => cells[name]));
  node.addEventListener("click", (event) => event.target.closest("a") || link.click());
  return { node, cells };
}

function fillRow(cells, one) {
  const tone = WRONG.has(one.state) ? "bad" : one.state === "completed" ? "good" : one.state === "cancelled" ? "warn" : "now";
  const outcome = one.outcome && one.outcome !== one.state ? `${one.state}: ${one.outcome}` : one.state;
  cells.state.className = `nowrap ${tone}`;
  cells.state.title = one.message;
  say(cells.at, clock(one.received_unix_s));
  say(cells.state, outcome + (one.retries ? `, ${one.retries + 1} attempts` : ""));
  const decisions = [one.queue_ms || one.state === "queued" ? "queue" : "", one.action.replace("_", " "), one.state === "rejected" ? "reject" : ""];
  say(cells.decision, decisions.filter(Boolean).join(", then "));
  say(cells.executor, one.executor);
  say(cells.queue, one.queue_ms ? took(one.queue_ms) : "");
  say(cells.ttft, took(one.ttft_ms));
  say(cells.total, took(one.e2e_ms));
  say(cells.speed, one.tokens_per_s ? number(one.tokens_per_s, one.tokens_per_s < 10 ? 1 : 0) : "");
  say(cells.prompt, one.prompt_tokens ? number(one.prompt_tokens) : "");
  say(cells.cached, one.cached_tokens ? number(one.cached_tokens) : "");
  say(cells.output, one.completion_tokens ? number(one.completion_tokens) : "");
}
