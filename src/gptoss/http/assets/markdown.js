// Markdown as nodes, from markdown-it's tokens and never from its HTML.
//
// Only elements of a fixed list are made, with attributes of a fixed list; links lead to http, https and mailto alone,
// and pictures are links, so that an answer can make a browser load nothing.

import MarkdownIt from "./vendor/markdown-it.mjs";
import { copyButton, h } from "./dom.js";

const parser = new MarkdownIt({ html: false, linkify: true, maxNesting: 40 });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });

const TAGS = new Set("p h1 h2 h3 h4 h5 h6 ul ol li blockquote table thead tbody tr th td strong em s a".split(" "));
// The page's own headings stand above those of an answer.
const LOWERED = { h1: "h3", h2: "h4", h3: "h5", h4: "h6", h5: "h6" };
const ALIGNED = { "text-align:center": "center", "text-align:right": "right" };

/** Shows text that grows: only blocks that changed are made anew. */
export class Markdown {
  constructor(target) {
    this.target = target;
    this.blocks = [];
  }

  /** Show `text`. `isWhole`: no more will come, so everything is made once more, as the whole text has it. */
  show(text, isWhole = false) {
    const lines = text.split("\n");
    const blocks = blocksOf(parser.parse(text, {}), lines);
    let same = 0;
    while (!isWhole && same < blocks.length && blocks[same].source === this.blocks[same]?.source) same += 1;
    if (same === blocks.length - 1 && this.blocks.length === blocks.length && grown(this.blocks[same], blocks[same])) {
      this.blocks[same] = { ...blocks[same], nodes: this.blocks[same].nodes };
      return;
    }
    for (const old of this.blocks.splice(same)) old.nodes.forEach((node) => node.remove());
    for (const block of blocks.slice(same)) {
      const holder = document.createDocumentFragment();
      build(block.tokens, holder);
      this.blocks.push({ ...block, nodes: [...holder.childNodes] });
      this.target.append(holder);
    }
  }
}

/** Whether the newer block is the older one with more code in it; then that is shown in the node that is there. */
function grown(older, newer) {
  const [before] = older.tokens;
  const [now] = newer.tokens;
  if (before.type !== "fence" || now.type !== "fence" || before.info !== now.info) return false;
  older.nodes[0].querySelector("code").textContent = now.content;
  return true;
}

function blocksOf(tokens, lines) {
  const blocks = [];
  let open = [];
  for (const token of tokens) {
    open.push(token);
    if (token.level !== 0 || token.nesting === 1) continue;
    const [start, end] = open[0].map ?? [0, lines.length];
    blocks.push({ tokens: open, source: `${open[0].type} ${lines.slice(start, end).join("\n")}` });
    open = [];
  }
  return blocks;
}

function build(tokens, parent) {
  const path = [parent];
  for (const token of tokens) {
    const here = path.at(-1);
    if (token.nesting === 1) {
      const node = token.hidden ? here : opened(token);
      if (node !== here) here.append(node);
      path.push(node);
    } else if (token.nesting === -1) {
      path.pop();
    } else if (token.type === "inline") {
      build(token.children, here);
    } else {
      here.append(leaf(token));
    }
  }
}

function opened(token) {
  if (!TAGS.has(token.tag)) return h("span");
  if (token.tag === "a") return link(token.attrGet("href"));
  const node = h(LOWERED[token.tag] ?? token.tag, {
    class: ALIGNED[token.attrGet("style")],
    start: token.tag === "ol" ? token.attrGet("start") : null,
  });
  return node;
}

function leaf(token) {
  switch (token.type) {
    case "softbreak":
      return document.createTextNode("\n");
    case "hardbreak":
      return h("br");
    case "hr":
      return h("hr");
    case "code_inline":
      return h("code", {}, token.content);
    case "fence":
    case "code_block":
      return code(token.content, token.info.trim().split(/\s/, 1)[0]);
    case "image": {
      const node = link(token.attrGet("src"));
      node.append(token.content || "picture");
      return node;
    }
    default:
      return document.createTextNode(token.content);
  }
}

function link(address) {
  const isSafe = /^(https?:|mailto:)/i.test(address ?? "");
  return isSafe ? h("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }) : h("span");
}

function code(text, language) {
  const body = h("code", {}, text);
  return h(
    "figure",
    { class: "code" },
    h("figcaption", {}, h("span", {}, language), copyButton(() => body.textContent, "Copy", { title: "Copy the code" })),
    h("pre", { tabindex: 0, "aria-label": language ? `Code, ${language}` : "Code" }, body),
  );
}
