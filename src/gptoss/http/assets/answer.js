// One answer as it comes: thoughts apart, text as Markdown, and below it what it took.

import { cancel } from "./api.js";
import { copyButton, h, many, number, say, took } from "./dom.js";
import { Markdown } from "./markdown.js";

const ENDINGS = { length: "cut at max tokens", abort: "stopped", tool_calls: "asked for a tool" };
const FACTS_EVERY_MS = 250;
// Drawing may take so much of the time; what comes meanwhile is drawn together.
const DRAWING_SHARE = 0.25;

export class Answer {
  /** `actions`: `again` asks once more, `open` shows what happened to a request. */
  constructor(actions) {
    this.actions = actions;
    this.text = "";
    this.thoughts = "";
    this.facts = { requestId: "", tokens: 0 };
    this.startedMs = performance.now();
    this.summary = h("summary", {}, "Thinking");
    this.thoughtText = h("div", { class: "thought-text" });
    this.thought = h("details", { class: "thought", open: true, hidden: true }, this.summary, this.thoughtText);
    this.summary.addEventListener("click", () => (this.isThoughtChosen = true));
    this.body = h("div", { class: "markdown" });
    this.markdown = new Markdown(this.body);
    this.wait = h("p", { class: "wait soft" }, "Waiting for its turn");
    this.trouble = h("div", { class: "trouble", hidden: true });
    this.footer = h("footer", { class: "facts", hidden: true });
    this.node = h(
      "li",
      { class: "turn assistant", "aria-busy": "true" },
      h("h2", { class: "sr" }, "Answer"),
      this.thought,
      this.body,
      this.wait,
      this.trouble,
      this.footer,
    );
  }

  /** The server has taken the request. */
  opened(requestId) {
    this.facts.requestId = requestId;
    say(this.wait, "Reading");
  }

  /** What a chunk of the stream brings. Returns the visible text in it. */
  take(chunk) {
    const [choice] = chunk.choices;
    const { content = "", reasoning = "" } = choice?.delta ?? {};
    const now = performance.now();
    if (content || reasoning) {
      this.facts.ttftMs ??= now - this.startedMs;
      this.firstMs ??= now;
      this.lastMs = now;
    }
    if (reasoning) {
      this.thoughts += reasoning;
      this.thinkingMs ??= now;
    }
    if (content && !this.text && this.thoughts) this.thoughtMs = now - this.thinkingMs;
    this.text += content;
    if (choice?.finish_reason) this.facts.finish = choice.finish_reason;
    if (chunk.usage) this.count(chunk.usage);
    this.draw();
    return content;
  }

  count(usage) {
    this.facts.tokens = usage.completion_tokens;
    this.facts.prompt = usage.prompt_tokens;
    this.facts.cached = usage.prompt_tokens_details?.cached_tokens;
    this.facts.thoughts = usage.completion_tokens_details?.reasoning_tokens;
    const tookMs = (this.lastMs ?? 0) - (this.firstMs ?? 0);
    if (this.firstMs == null) return;
    this.firstTokens ??= usage.completion_tokens; // Those that came with the first chunk took no time that is known.
    if (tookMs > 0) this.facts.perS = ((usage.completion_tokens - this.firstTokens) * 1000) / tookMs;
  }

  draw() {
    if (this.frame || this.isOver) return;
    const waitMs = (this.drawingMs ?? 0) / DRAWING_SHARE;
    const next = () => (this.frame = requestAnimationFrame(() => this.drawNow()));
    // A hidden tab gets no frames; what came is drawn when it is looked at again.
    this.frame = waitMs > 16 ? setTimeout(next, waitMs) : next();
  }

  drawNow() {
    this.frame = 0;
    if (this.isOver) return;
    const startMs = performance.now();
    this.show(false);
    if (startMs - (this.factsMs ?? 0) > FACTS_EVERY_MS) {
      this.factsMs = startMs;
      this.tellFacts();
    }
    this.drawingMs = performance.now() - startMs;
    this.actions.grown();
  }

  show(isWhole) {
    this.wait.hidden = Boolean(this.text || this.thoughts || isWhole);
    if (this.thoughts) {
      this.thought.hidden = false;
      say(this.thoughtText, this.thoughts);
      const isThinking = !this.text && !isWhole;
      this.thought.classList.toggle("now", isThinking);
      say(this.summary, isThinking ? "Thinking" : `Thought${this.thoughtMs ? ` for ${took(this.thoughtMs)}` : ""}`);
      if (!this.isThoughtChosen) this.thought.open = isThinking;
    }
    if (this.text) this.markdown.show(this.text, isWhole);
  }

  /** No more will come. `refusal`: why, unless all is well. */
  end(refusal = null) {
    this.isOver = true;
    this.node.removeAttribute("aria-busy");
    this.facts.requestId = refusal?.requestId || this.facts.requestId;
    this.show(true);
    this.tellFacts();
    if (refusal) this.tellTrouble(refusal);
    this.footer.append(this.buttons());
  }

  tellFacts() {
    const { tokens, perS, ttftMs, cached, prompt, thoughts, finish } = this.facts;
    const words = [
      tokens ? many(tokens, "token") : "",
      thoughts ? `${number(thoughts)} of them thoughts` : "",
      perS ? `${number(perS, perS < 10 ? 1 : 0)} tokens/s` : "",
      ttftMs != null ? `first after ${took(ttftMs)}` : "",
      cached != null ? `${number(cached)} of ${number(prompt)} prompt tokens cached` : "",
      ENDINGS[finish] ?? "",
    ];
    this.footer.hidden = false;
    this.footer.replaceChildren(h("p", {}, words.filter(Boolean).map((word) => h("span", {}, word))));
  }

  buttons() {
    const id = this.facts.requestId;
    return h(
      "div",
      { class: "row" },
      id && h("button", { type: "button", class: "quiet", click: () => this.actions.open(id) }, "What happened"),
      this.text && copyButton(() => this.text, "Copy"),
      h("button", { type: "button", class: "quiet again", click: () => this.actions.again(this) }, "Try again"),
      id && h("code", { class: "id", title: "Request id" }, id),
    );
  }

  tellTrouble(refusal) {
    const where = [refusal.status || "", refusal.code, refusal.param ? `field ${refusal.param}` : ""];
    const retry = h("button", { type: "button", class: "again", click: () => this.actions.again(this) }, "Try again");
    this.trouble.hidden = false;
    this.trouble.replaceChildren(
      h("p", {}, refusal.message),
      h("p", { class: "soft" }, where.filter(Boolean).join(" · ")),
      retry,
    );
    if (refusal.retryAfterS) countDown(retry, refusal.retryAfterS);
  }

  /** Have the server stop; the stream then ends by itself, with its counts. */
  stop() {
    say(this.wait, "Stopping");
    return cancel(this.facts.requestId);
  }
}

/** The server's own advice when to come back; the button works before that too. */
function countDown(button, seconds) {
  const endMs = performance.now() + seconds * 1000;
  const advice = h("p", { class: "advice" }, `The server asks to wait ${many(seconds, "second")}.`);
  button.before(advice);
  const tick = () => {
    const leftS = Math.ceil((endMs - performance.now()) / 1000);
    button.textContent = leftS > 0 ? `Try again (${leftS} s)` : "Try again";
    if (leftS > 0 && button.isConnected) setTimeout(tick, 250);
  };
  tick();
}
