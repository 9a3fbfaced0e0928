// What happened to one request: its phases on one time axis, the steps it shared, what delayed it, and its records.

import { bundlePath, events, story } from "./api.js";
import { h, many, number, say, svg, took } from "./dom.js";

const AGAIN_MS = 1_000;
const BAR_MIN = 3;
const WIDTH = 1000;
const DELAYS_SHOWN = 12;
const KINDS = {
  queued: "queue",
  enqueued: "queue",
  "no memory": "queue",
  prefill: "prefill",
  decode: "decode",
  "first token": "decode",
  completed: "decode",
  preempted: "preempted",
  failed: "bad",
  fault: "bad",
  rejected: "bad",
  cancelled: "queue",
};
const DELAYS = {
  queue: ["waited in the queue for", "queue"],
  engine: ["waited in line of the engine for", "queue"],
  step: ["shared steps with the prefill of", "prefill"],
  preemption: ["lost its memory to", "preempted"],
  restart: ["lost its engine", "bad"],
};

export class StoryDialog {
  constructor(dialog) {
    this.dialog = dialog;
    this.id = "";
    dialog.addEventListener("close", () => this.leave());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }

  /** Show the story of `id`, or nothing for an empty id. */
  async show(id) {
    if (id === this.id) return;
    this.id = id;
    clearTimeout(this.timer);
    if (!id) {
      this.dialog.close();
      return;
    }
    this.body = h("div", { class: "story-body" }, h("p", { class: "soft" }, "Reading its records."));
    this.title = h("h2", { id: "story-title", tabindex: -1 }, h("code", {}, id));
    this.dialog.replaceChildren(
      h("header", {}, this.title, h("button", { type: "button", class: "quiet", click: () => this.dialog.close() }, "Close")),
      this.body,
      this.tools(),
    );
    if (!this.dialog.open) this.dialog.showModal();
    this.title.focus();
    await this.look(id);
  }

  leave() {
    clearTimeout(this.timer);
    this.id = "";
    if (location.hash.includes("/")) history.pushState(null, "", location.hash.split("/", 1)[0]);
  }

  async look(id) {
    let found;
    try {
      found = await story(id);
    } catch (error) {
      if (this.id === id) this.body.replaceChildren(h("p", { class: "trouble", role: "alert" }, error.message));
      return;
    }
    if (this.id !== id) return;
    this.body.replaceChildren(...told(found));
    const isOpen = found.timeline.outcome === "open";
    if (isOpen) this.timer = setTimeout(() => (document.hidden ? this.later(id) : this.look(id)), AGAIN_MS);
  }

  later(id) {
    addEventListener("visibilitychange", () => this.id === id && this.look(id), { once: true });
  }

  tools() {
    const { id } = this;
    const list = h("ol", { class: "records" });
    const records = h("details", {}, h("summary", {}, "All its records"), list);
    records.addEventListener("toggle", () => records.open && !list.childNodes.length && listRecords(list, id), { once: true });
    const link = h("a", { class: "button main", href: bundlePath(id, "none"), download: true }, "Download the bundle");
    const level = h(
      "select",
      { id: "bundle-content", change: () => (link.href = bundlePath(id, level.value)) },
      h("option", { value: "none" }, "no prompt, no answer"),
      h("option", { value: "hash" }, "hashes of tokens"),
      h("option", { value: "tokens" }, "tokens"),
      h("option", { value: "full" }, "tokens and text"),
    );
    return h(
      "footer",
      {},
      records,
      h("div", { class: "row" }, link, h("label", { for: "bundle-content" }, "with"), level),
      h("p", { class: "soft" }, "Everything that decided about this request, as one file: ", h("code", {}, "gptoss replay FILE"), " decides it again."),
    );
  }
}

async function listRecords(list, id) {
  list.replaceChildren(h("li", { class: "soft" }, "Reading."));
  try {
    const { events: records } = await events(id);
    const begin = records[0].mono_ns;
    list.replaceChildren(
      ...records.map(({ pos, type, stream, mono_ns: at, data }) =>
        h("li", {}, h("span", { class: "soft" }, `#${pos}  ${took((at - begin) / 1e6)}  ${stream}`), " ", h("b", {}, type), " ", h("code", {}, JSON.stringify(data))),
      ),
    );
  } catch (error) {
    list.replaceChildren(h("li", { class: "bad" }, error.message));
  }
}

function told({ timeline, delays, steps, is_cut: isCut }) {
  const { outcome, total_ms: total, ttft_ms: ttft, attempts, decode } = timeline;
  const tone = ["failed", "rejected"].includes(outcome) ? "bad" : outcome === "completed" ? "good" : outcome === "cancelled" ? "warn" : "now";
  const facts = [
    took(total),
    ttft == null ? "" : `first token after ${took(ttft)}`,
    decode ? `${many(decode.tokens, "token")} in ${many(decode.steps, "step")} of ${took(decode.p50_step_ms)}` : "",
    decode?.others_max ? `beside up to ${many(decode.others_max, "other")}` : "",
    attempts > 1 ? many(attempts, "attempt") : "",
  ];
  return [
    h("p", { class: "headline" }, h("b", { class: tone }, outcome === "open" ? "running" : outcome), h("span", { class: "soft" }, facts.filter(Boolean).join(" · "))),
    phaseTable(timeline),
    ...stepStrip(steps, total),
    ...delayTable(delays, total),
    isCut && h("p", { class: "soft" }, "Its life has more records than are looked at; the delays are of its beginning."),
  ].filter(Boolean);
}

function phaseTable({ phases, total_ms: total }) {
  const rows = phases.map(({ name, start_ms: start, end_ms: end, detail, mark }) =>
    h(
      "tr",
      { class: mark ? "mark" : null },
      h("th", { scope: "row", class: "nowrap" }, name),
      h("td", { class: "n" }, took(start)),
      h("td", { class: "n" }, mark ? "" : took(end - start)),
      h("td", { class: "wide" }, bar(start, end, total, KINDS[name] ?? "other", mark)),
      h("td", { class: "text" }, detail),
    ),
  );
  const head = h("tr", {}, h("th", {}, "phase"), h("th", { class: "n" }, "at"), h("th", { class: "n" }, "took"), h("th", { class: "wide" }), h("th", {}));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Phases" }, h("table", { class: "waterfall" }, h("thead", {}, head), h("tbody", {}, rows)));
}

function bar(start, end, total, kind, isMark = false) {
  const scale = WIDTH / Math.max(total, 1e-6);
  const x = Math.min(start * scale, WIDTH - BAR_MIN);
  const width = isMark ? BAR_MIN : Math.max(BAR_MIN, Math.min(end * scale, WIDTH) - x);
  return svg(
    "svg",
    { class: "bar", viewBox: `0 0 ${WIDTH} 10`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: `f-${kind}`, x: x.toFixed(1), width: width.toFixed(1), y: isMark ? 0 : 1, height: isMark ? 10 : 8 }),
  );
}

/** Each step as high as it took, in the colour of what it did, above how many shared it. */
function stepStrip(columns, total) {
  if (!columns.length) return [];
  const scale = WIDTH / Math.max(total, 1e-6);
  const longest = Math.max(...columns.map((column) => column.longest_ms), 1e-6);
  const most = Math.max(...columns.map((column) => column.others));
  const kindOf = (column) => (column.is_preempted ? "preempted" : column.prefilled ? "prefill" : column.others_prefilled ? "queue" : "decode");
  const bars = columns.map((column) => {
    const x = column.start_ms * scale;
    const width = Math.max(1.2, (column.end_ms - column.start_ms) * scale - 0.6);
    const height = Math.max(2, (60 * column.longest_ms) / longest);
    const others = most ? (28 * column.others) / most : 0;
    const last = column.first_step + column.steps - 1;
    const name = column.steps > 1 ? `Steps ${column.first_step} to ${last}` : `Step ${column.first_step}`;
    const did = [
      column.prefilled && `${many(column.prefilled, "prompt token")} computed`,
      column.tokens && many(column.tokens, "token"),
      `${many(column.others, "other")} beside it`,
      column.others_prefilled && `who computed ${many(column.others_prefilled, "prompt token")}`,
      column.is_preempted && "preempted",
    ];
    return svg(
      "g",
      {},
      svg("title", {}, `${name}: ${took(column.longest_ms)}; ${did.filter(Boolean).join(", ")}`),
      svg("rect", { class: `f-${kindOf(column)}`, x, width, y: 62 - height, height }),
      svg("rect", { class: "f-other", x, width, y: 66, height: others }),
    );
  });
  const steps = columns.reduce((count, column) => count + column.steps, 0);
  const key = (kind, text) => h("span", {}, h("i", { class: `key b-${kind}` }), text);
  const company = most ? `shared with at most ${many(most, "other")}` : "alone in each";
  const label = `${many(steps, "step")}, the longest ${took(longest)}, ${company}`;
  return [
    h("h3", {}, "The steps it shared"),
    h("p", { class: "soft" }, `${label}. Above, how long each took${most ? "; below, how many others were in it" : ""}.`),
    svg("svg", { class: "strip", viewBox: `0 0 ${WIDTH} ${most ? 96 : 64}`, preserveAspectRatio: "none", role: "img", "aria-label": label }, bars),
    h(
      "p",
      { class: "legend" },
      key("prefill", "its prompt"),
      key("decode", "its tokens"),
      columns.some((column) => column.others_prefilled) && key("queue", "beside another's prompt"),
      columns.some((column) => column.is_preempted) && key("preempted", "preempted"),
      most > 0 && key("other", "others"),
    ),
  ];
}

/** To another request's story, in the view that is shown. */
function linkTo(id) {
  return h("a", { class: "mono", href: `${location.hash.split("/", 1)[0]}/${encodeURIComponent(id)}` }, id);
}

function delayTable(delays, total) {
  const heading = h("h3", {}, "What delayed it");
  if (!delays.length) return [heading, h("p", { class: "soft" }, "Nothing that cost half a percent of its time.")];
  const rows = delays.slice(0, DELAYS_SHOWN).map((delay) => {
    const [words, kind] = DELAYS[delay.kind];
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, `${words} `, delay.kind === "restart" ? h("code", {}, delay.who) : linkTo(delay.who)),
      h("td", { class: "n" }, took(delay.took_ms)),
      h("td", { class: "n" }, `${number(delay.share * 100)}%`),
      h("td", { class: "wide" }, bar(delay.start_ms, delay.end_ms, total, kind)),
      h("td", { class: "text" }, delay.detail),
    );
  });
  const head = h("tr", {}, h("th", {}, "it"), h("th", { class: "n" }, "took"), h("th", { class: "n" }, "share"), h("th", { class: "wide" }), h("th", {}));
  const left = delays.length - DELAYS_SHOWN;
  return [
    heading,
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "What delayed it" }, h("table", { class: "waterfall" }, h("thead", {}, head), h("tbody", {}, rows))),
    left > 0 && h("p", { class: "soft" }, `and ${number(left)} that cost less`),
  ];
}
