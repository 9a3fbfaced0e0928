// What a chat asks for beside its messages: a dialog, kept in this browser.

import { many, say } from "./dom.js";

const KEY = "gptoss.settings";
const NUMBERS = { temperature: Number, max_tokens: Number, seed: Number };

export class Settings {
  constructor() {
    this.dialog = document.getElementById("settings");
    this.form = document.getElementById("settings-form");
    this.said = document.getElementById("settings-said");
    document.getElementById("open-settings").addEventListener("click", () => this.dialog.showModal());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault(); // Only a form whose fields are valid is submitted.
      this.dialog.close();
    });
    this.form.addEventListener("input", () => this.keep());
    this.form.addEventListener("reset", () => setTimeout(() => this.keep()));
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog && this.form.reportValidity()) this.dialog.close();
    });
    this.dialog.addEventListener("cancel", (event) => {
      if (!this.form.reportValidity()) event.preventDefault();
    });
    this.restore();
  }

  /** The fields of a request; those left empty are left out. */
  fields() {
    const found = {};
    for (const [name, value] of new FormData(this.form)) {
      if (value.trim() && name !== "system") found[name] = (NUMBERS[name] ?? String)(value);
    }
    return found;
  }

  /** The system prompt, or an empty string. */
  get system() {
    return this.form.elements.system.value.trim();
  }

  keep() {
    this.tell();
    try {
      localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(new FormData(this.form))));
    } catch {
      // A browser that keeps nothing: they hold until the page is closed.
    }
  }

  restore() {
    try {
      for (const [name, value] of Object.entries(JSON.parse(localStorage.getItem(KEY)) ?? {})) {
        const field = this.form.elements[name];
        if (field) field.value = value;
      }
    } catch {
      // Nothing kept, or nothing that can be read.
    }
    this.tell();
  }

  tell() {
    const { temperature, max_tokens: most, seed, reasoning_effort: effort } = this.fields();
    const words = [
      this.system && "system prompt",
      temperature != null && `temperature ${temperature}`,
      most != null && `at most ${many(most, "token")}`,
      seed != null && `seed ${seed}`,
      effort && `${effort} reasoning`,
    ];
    say(this.said, words.filter(Boolean).join(" · "));
  }
}
