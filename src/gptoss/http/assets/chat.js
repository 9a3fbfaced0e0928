// The conversation: what was said, who is asked next, and the box to write in.

import { chat, Refusal } from "./api.js";
import { Answer } from "./answer.js";
import { h, say } from "./dom.js";
import { Settings } from "./settings.js";
import { Spoken } from "./spoken.js";

const IDEAS = [
  "Explain what a prefix cache is to a new colleague.",
  "Write a haiku about a queue that never ends.",
  "A table of three sorting algorithms and what each costs.",
];
const KEY = "gptoss.turns";
const NEAR_END_PX = 48;
// A stopped stream ends by itself within two steps; after this the connection is cut instead.
const STOP_PATIENCE_MS = 3_000;

const by = (id) => document.getElementById(id);

export class Chat {
  /** `open`: shows what happened to a request, by its id. */
  constructor(open) {
    this.open = open;
    this.settings = new Settings();
    this.spoken = new Spoken(by("spoken"));
    this.turns = [];
    this.running = null;
    this.isReady = true;
    this.log = by("log");
    this.list = by("turns");
    this.prompt = by("prompt");
    this.listen();
    this.restore();
    this.tell();
  }

  listen() {
    by("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(this.prompt.value);
    });
    this.prompt.addEventListener("keydown", (event) => {
      const isPhone = matchMedia("(pointer: coarse)").matches; // There Enter has no Shift to go with it.
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !isPhone) {
        event.preventDefault();
        this.send(this.prompt.value);
      } else if (event.key === "Escape" && this.running) {
        this.stop();
      }
    });
    this.prompt.addEventListener("input", () => this.tell());
    by("stop").addEventListener("click", () => this.stop());
    by("new-chat").addEventListener("click", () => this.clear());
    by("to-end").addEventListener("click", () => this.toEnd("smooth"));
    this.log.addEventListener("scroll", () => (by("to-end").hidden = this.isNearEnd()), { passive: true });
    by("ideas").replaceChildren(
      ...IDEAS.map((idea) => h("li", {}, h("button", { type: "button", click: () => this.send(idea) }, idea))),
    );
  }

  /** Whether the server would serve a message now. */
  ready(isReady) {
    this.isReady = isReady;
    this.tell();
  }

  send(text) {
    if (!text.trim() || this.running || !this.isReady) return;
    this.prompt.value = "";
    this.add({ role: "user", content: text.trim() });
    this.ask();
  }

  async ask() {
    const answer = this.newAnswer();
    this.list.append(answer.node);
    const turn = { role: "assistant", content: "", thoughts: "", node: answer.node };
    const controller = new AbortController();
    this.turns.push(turn);
    this.running = { answer, controller };
    this.tell();
    this.toEnd();
    let refusal = null;
    try {
      const { requestId, chunks } = await chat(this.body(), (answer.facts.requestId = freshId()), controller.signal);
      answer.opened(requestId);
      for await (const chunk of chunks) this.spoken.more(answer.take(chunk));
    } catch (error) {
      if (error.name === "AbortError") answer.facts.finish = "abort";
      else refusal = error instanceof Refusal ? error : new Refusal(`This page failed: ${error.message}`);
    }
    const wasNear = this.isNearEnd();
    const hadFocus = document.activeElement === by("stop");
    answer.end(refusal);
    Object.assign(turn, { content: answer.text, thoughts: answer.thoughts, facts: answer.facts });
    this.spoken.end(refusal ? `Not answered: ${refusal.message}` : "End of the answer.");
    this.running = null;
    this.tell();
    this.keep();
    if (hadFocus) this.prompt.focus();
    if (wasNear) this.toEnd();
  }

  body() {
    const messages = this.settings.system ? [{ role: "system", content: this.settings.system }] : [];
    for (const { role, content } of this.turns) {
      // Turns that were never answered are one with the next: some templates want the speakers to take turns.
      if (messages.at(-1)?.role === role) messages.at(-1).content += `\n\n${content}`;
      else if (content) messages.push({ role, content });
    }
    return { messages, ...this.settings.fields() };
  }

  newAnswer() {
    return new Answer({
      open: this.open,
      again: (answer) => this.again(answer),
      grown: () => this.isFollowing && this.toEnd(),
    });
  }

  again(answer) {
    if (this.running || this.turns.at(-1)?.node !== answer.node) return;
    this.turns.pop();
    answer.node.remove();
    this.ask();
    this.prompt.focus();
  }

  stop() {
    const { answer, controller } = this.running ?? {};
    if (!answer) return;
    if (document.activeElement === by("stop")) this.prompt.focus();
    by("stop").disabled = true;
    answer.stop().catch(() => controller.abort());
    setTimeout(() => controller.abort(), STOP_PATIENCE_MS);
  }

  clear() {
    this.running?.controller.abort();
    this.turns = [];
    this.list.replaceChildren();
    this.keep();
    this.tell();
    this.prompt.focus();
  }

  add(turn) {
    turn.node = h(
      "li",
      { class: "turn user" },
      h("h2", { class: "sr" }, "You"),
      h("p", { class: "bubble" }, turn.content),
    );
    this.turns.push(turn);
    this.list.append(turn.node);
  }

  /** Bring the controls in line with what is so. */
  tell() {
    const { running } = this;
    const hadFocus = document.activeElement === by("send");
    by("send").hidden = Boolean(running);
    by("send").disabled = !this.isReady || !this.prompt.value.trim();
    say(by("send"), this.isReady ? "Send" : "Not ready");
    by("stop").hidden = !running;
    by("stop").disabled = false;
    by("new-chat").hidden = !this.turns.length;
    by("empty").hidden = this.turns.length > 0;
    for (const button of by("ideas").querySelectorAll("button")) button.disabled = !this.isReady;
    this.list.querySelectorAll(".again").forEach((button) => {
      button.hidden = Boolean(running) || button.closest(".turn") !== this.turns.at(-1)?.node;
    });
    if (hadFocus && running) by("stop").focus();
    // Browsers without `field-sizing` grow the box here.
    if (!CSS.supports("field-sizing", "content")) {
      this.prompt.rows = Math.min(8, this.prompt.value.split("\n").length);
    }
  }

  isNearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.log;
    this.isFollowing = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
    return this.isFollowing;
  }

  toEnd(behavior = "instant") {
    const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.isFollowing = true;
    this.log.scrollTo({ top: this.log.scrollHeight, behavior: isStill ? "instant" : behavior });
  }

  keep() {
    const turns = this.turns.map(({ role, content, thoughts, facts }) => ({ role, content, thoughts, facts }));
    try {
      sessionStorage.setItem(KEY, JSON.stringify(turns));
    } catch {
      // Too long, or a browser that keeps nothing: a reload begins anew.
    }
  }

  restore() {
    let turns = [];
    try {
      turns = JSON.parse(sessionStorage.getItem(KEY)) ?? [];
    } catch {
      // Nothing kept, or nothing that can be read.
    }
    for (const turn of turns) {
      if (turn.role === "user") {
        this.add(turn);
        continue;
      }
      const answer = this.newAnswer();
      Object.assign(answer, { text: turn.content, thoughts: turn.thoughts, facts: turn.facts ?? answer.facts });
      answer.end();
      this.turns.push({ ...turn, node: answer.node });
      this.list.append(answer.node);
    }
    if (turns.length) this.toEnd();
  }
}

/** An id that the server takes as the request's own, so that a request can be stopped before it has begun. */
function freshId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12)); // `randomUUID` is not there for pages over plain HTTP.
  return `page-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}
