// What a screen reader hears of text that streams: whole sentences, with pauses, not every token.

const PAUSE_MS = 1_200;
const KEPT = 12;

export class Spoken {
  constructor(region) {
    this.region = region;
    this.waiting = "";
    this.timer = 0;
  }

  /** More of a text; it is said once its sentence is complete. */
  more(text) {
    this.waiting += text;
    this.timer ||= setTimeout(() => this.tell(), PAUSE_MS);
  }

  /** The rest of the text, whatever it is, and a last word. */
  end(word) {
    clearTimeout(this.timer);
    this.timer = 0;
    this.put(`${this.waiting} ${word}`);
    this.waiting = "";
  }

  tell() {
    this.timer = 0;
    const [sentences] = /^[\s\S]*[.!?:;\n](?=\s|$)/.exec(this.waiting) ?? [""];
    this.put(sentences);
    this.waiting = this.waiting.slice(sentences.length);
  }

  put(text) {
    if (!text.trim()) return;
    const line = document.createElement("p");
    line.textContent = text;
    this.region.append(line);
    while (this.region.childNodes.length > KEPT) this.region.firstChild.remove();
  }
}
