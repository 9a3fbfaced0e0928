// A small chart of the last minutes, drawn as SVG at the size that it has.
//
// A series is a list of numbers, one a second, null where nothing is known. Kinds: `line` joins what is known, `level`
// fills the ground below it, `dots` marks each alone, `bars` stacks on the series before it.

import { clock, h, say, svg } from "./dom.js";

const PAD = { top: 6, right: 1, bottom: 2, left: 1 };
const HEIGHT = 84;
const BAR_SECONDS = 5;

export class Chart {
  /**
   * `series`: (name, kind, color) each; `unit` writes a value; `least` is the smallest top of the scale, which has round
   * numbers of `base`.
   */
  constructor({ title, series, unit, least = 1, base = 10, hint = "" }) {
    Object.assign(this, { series, unit, least, base, values: series.map(() => []), endS: 0, cursor: null });
    this.now = h("output", { class: "now" });
    this.aside = h("span", { class: "aside soft" });
    this.top = h("span", { class: "top-value" });
    // Below a level its ground, without an outline of its own.
    this.grounds = series.map(({ kind, color }) => kind === "level" && svg("path", { class: `ground c-${color}` }));
    this.paths = series.map(({ kind, color }) => svg("path", { class: `${kind} c-${color}` }));
    this.mark = svg("path", { class: "cursor" });
    this.image = svg("svg", { height: HEIGHT, "aria-hidden": "true" }, this.grounds, this.paths, this.mark);
    this.plot = h(
      "div",
      {
        class: "plot",
        tabindex: 0,
        role: "group",
        "aria-label": `${title}, the last minutes. Left and right read single seconds.`,
        pointermove: (event) => this.point(event),
        pointerleave: () => this.choose(null),
        keydown: (event) => this.step(event),
        blur: () => this.choose(null),
      },
      this.top,
      this.image,
    );
    this.readout = h("p", { class: "readout soft", "aria-live": "polite" });
    this.node = h(
      "figure",
      { class: "card" },
      h("figcaption", { title: hint || null }, title),
      h("p", { class: "headline" }, this.now, this.aside),
      this.plot,
      this.readout,
    );
    this.keys = series.map(({ name, color }) => h("span", {}, h("i", { class: `key b-${color}` }), name));
    this.legend = h("span", { class: "legend" }, this.keys);
    this.window = h("span");
    this.choose(null);
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  /** `values`: one list for each series, all as long; `endS`: Unix seconds of the last entry. */
  show(values, endS, now, aside = "") {
    Object.assign(this, { values, endS });
    say(this.now, now);
    say(this.aside, aside);
    say(this.window, values[0].length > 60 ? `last ${values[0].length / 60} min` : "last minute");
    this.draw();
  }

  draw() {
    const width = this.plot.clientWidth;
    const count = this.values[0].length;
    if (!width || !count) return;
    this.image.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const stacked = this.stacked();
    const most = nice(Math.max(this.least, ...stacked.flat().map((value) => value ?? 0)), this.base);
    const x = (index) => PAD.left + ((width - PAD.left - PAD.right) * index) / Math.max(1, count - 1);
    const y = (value) => HEIGHT - PAD.bottom - ((HEIGHT - PAD.top - PAD.bottom) * value) / most;
    this.series.forEach(({ kind }, index) => {
      const below = kind === "bars" && index ? stacked[index - 1] : null;
      this.paths[index].setAttribute("d", DRAW[kind](stacked[index], x, y, below));
      if (this.grounds[index]) this.grounds[index].setAttribute("d", ground(stacked[index], x, y));
      // Of stacked kinds only those that occur are worth a place.
      this.keys[index].hidden = kind === "bars" && index > 0 && !this.values[index].some(Boolean);
    });
    say(this.top, this.unit(most));
    this.mark.setAttribute("d", this.cursor == null ? "" : `M${x(this.cursor)} 0V${HEIGHT}`);
    this.tell();
  }

  stacked() {
    let below = null;
    return this.values.map((values, index) => {
      if (this.series[index].kind !== "bars") return values;
      const summed = binned(values).map((value, at) => value + (below?.[at] ?? 0));
      below = summed;
      return summed;
    });
  }

  point(event) {
    const { left, width } = this.plot.getBoundingClientRect();
    const share = (event.clientX - left) / width;
    this.choose(Math.round(Math.min(1, Math.max(0, share)) * (this.values[0].length - 1)));
  }

  step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -30, PageDown: 30 }[event.key];
    if (!by) return;
    event.preventDefault();
    const last = this.values[0].length - 1;
    this.choose(Math.min(last, Math.max(0, (this.cursor ?? last + 1) + by)));
  }

  choose(index) {
    this.cursor = index;
    if (index == null) this.readout.replaceChildren(this.legend, this.window);
    this.draw();
  }

  tell() {
    if (this.cursor == null) return;
    const at = clock(this.endS - (this.values[0].length - 1 - this.cursor));
    const words = this.series.map(({ name, kind }, index) => {
      const values = kind === "bars" ? binned(this.values[index]) : this.values[index];
      return `${name} ${values[this.cursor] == null ? "none" : this.unit(values[this.cursor])}`;
    });
    say(this.readout, `${at}  ${words.join(", ")}`);
  }
}

const DRAW = {
  line: (values, x, y) => trace(values, x, y),
  dots: (values, x, y) => values.map((value, at) => (value == null ? "" : `M${px(x(at))} ${px(y(value))}h0`)).join(""),
  level: (values, x, y) => trace(values, x, y),
  bars: (values, x, y, below) =>
    values
      .map((value, at) => {
        const ground = below?.[at] ?? 0;
        if (at % BAR_SECONDS || value <= ground) return "";
        const right = x(Math.min(values.length - 1, at + BAR_SECONDS)) - 1;
        return `M${px(x(at))} ${px(y(ground))}V${px(y(value))}H${px(right)}V${px(y(ground))}Z`;
      })
      .join(""),
};

function ground(values, x, y) {
  const line = trace(values, x, y);
  const first = values.findIndex((value) => value != null);
  return line && `${line}V${px(y(0))}H${px(x(first))}Z`;
}

function trace(values, x, y) {
  let pen = "M";
  let path = "";
  values.forEach((value, at) => {
    if (value == null) return;
    path += `${pen}${px(x(at))} ${px(y(value))}`;
    pen = "L";
  });
  return path && !path.includes("L") ? `${path}h0` : path;
}

/** Sums of `BAR_SECONDS` each, at every second of theirs. */
function binned(values) {
  const sums = [];
  for (let at = 0; at < values.length; at += BAR_SECONDS) {
    const sum = values.slice(at, at + BAR_SECONDS).reduce((total, value) => total + (value ?? 0), 0);
    for (let each = at; each < Math.min(values.length, at + BAR_SECONDS); each += 1) sums.push(sum);
  }
  return sums;
}

/** The next of 1, 2, 5, 10, 20, ...; with base 1024 of those times a power of it. */
function nice(value, base) {
  if (base !== 10) {
    const unit = base ** Math.floor(Math.log(value) / Math.log(base));
    return unit * nice(value / unit, 10);
  }
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((factor) => factor * unit >= value * 0.999) * unit;
}

const px = (value) => Math.round(value * 10) / 10;
