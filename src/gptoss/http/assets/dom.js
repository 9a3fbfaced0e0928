// Nodes and words. Text is always a text node, so nothing that a model or a client wrote can become markup.

const SVG = "http://www.w3.org/2000/svg";
const NUMBERS = [0, 1].map((digits) => new Intl.NumberFormat("en", { maximumFractionDigits: digits }));
const CLOCK = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

/** An element. `attributes`: functions are listeners, `false` and `null` are left out, `true` is an empty attribute. */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
}

/** Say `text` in `node`, touching it only where that changes something. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** `1 step`, `2,000 steps`. */
export function many(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** A number for people, with at most one digit after the point. */
export function number(value, digits = 0) {
  return NUMBERS[digits].format(value);
}

/** Milliseconds for people: `0.4 ms`, `86 ms`, `1.24 s`, `2 min 5 s`; empty when unknown. */
export function took(ms) {
  if (ms == null) return "";
  if (ms < 9.95) return `${ms.toFixed(1)} ms`;
  if (ms < 999.5) return `${ms.toFixed(0)} ms`;
  if (ms < 9_995) return `${(ms / 1000).toFixed(2)} s`;
  if (ms < 119_500) return `${(ms / 1000).toFixed(1)} s`;
  const s = Math.round(ms / 1000);
  return s < 7_200 ? `${Math.floor(s / 60)} min ${s % 60} s` : `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

/** Bytes for people. */
export function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1000 && unit < units.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${bytes >= 100 || unit === 0 ? bytes.toFixed(0) : bytes.toFixed(1)} ${units[unit]}`;
}

/** The time of day of a Unix time in seconds; empty when unknown. */
export function clock(unixS) {
  return unixS == null ? "" : CLOCK.format(unixS * 1000);
}

/** A button that puts `text()` on the clipboard and says so. */
export function copyButton(text, label, attributes = {}) {
  const button = h("button", { type: "button", class: "quiet copy", ...attributes }, label);
  button.addEventListener("click", async () => {
    const done = await copied(text());
    button.textContent = done ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = label), 1_500);
  });
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages that came over plain HTTP from another machine have no clipboard interface.
    const area = h("textarea", { class: "sr", readonly: true });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
