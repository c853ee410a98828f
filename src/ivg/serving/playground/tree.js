// The tree of drafts as SVG: one column per chunk, best on top. Knows events of the wire.

import { count, draw, figure, roving, shown } from "./dom.js";
import { aboutDraft, explains } from "./pop.js";

const [WIDE, HIGH, GAP, ACROSS, TOP] = [170, 24, 5, 40, 24];
const LETTERS = 18;

/** The growing tree. */
export class Tree {
  /** @param {{scroll: HTMLElement, words: HTMLElement, legend: HTMLElement}} parts */
  constructor(parts) {
    Object.assign(this, parts);
    roving(this.scroll, () => this.nodes.map((n) => n.element), (key, at) => this.next(key, at));
    this.clear();
  }

  clear() {
    Object.assign(this, { columns: [], nodes: [], byKey: new Map(), height: 0 });
    this.edges = draw("g");
    this.marks = draw("g");
    this.svg = draw("svg", { role: "group", "aria-label": "Tree of drafts" }, this.edges, this.marks);
    this.scroll.replaceChildren(this.svg);
    this.scroll.hidden = this.legend.hidden = true;
  }

  /** One more column. */
  take({ kept, dropped }) {
    const column = this.columns.length;
    const drafts = [...kept.map((n) => ({ ...n, kept: true })), ...dropped.map((n) => ({ ...n, kept: false }))]
      .sort((a, b) => (b.score ?? 0) - (a.score ?? 0) || b.kept - a.kept);
    const before = this.byKey;
    this.byKey = new Map();
    const nodes = drafts.map((draft, row) => this.node(draft, column, row, before.get(draft.key) ?? before.get(draft.parent)));
    for (const node of nodes) this.byKey.set(node.key, node);
    this.columns.push(nodes);
    this.nodes.push(...nodes);
    if (column === 0 && nodes.length) nodes[0].element.setAttribute("tabindex", "0");
    this.title(column, nodes);
    this.resize();
    const best = drafts.find((d) => d.score !== null)?.score;
    const about = best === undefined ? "" : `; best score ${figure(best)}`;
    this.words.textContent = `Chunk ${column + 1}: ${kept.length} kept, ${dropped.length} dropped${about}.`;
  }

  node(draft, column, row, parent) {
    const begin = parent && draft.text.startsWith(parent.text) ? parent.text.length : 0;
    const node = { ...draft, column, row, parent, chunk: draft.text.slice(begin), won: false };
    node.x = column * (WIDE + ACROSS) + 2;
    node.y = TOP + row * (HIGH + GAP);
    const label = shown(node.chunk.trim()), short = label.length > LETTERS ? `${label.slice(0, LETTERS - 1)}…` : label;
    const score = node.score === null ? "" : figure(node.score);
    node.element = draw("g", { class: `node ${node.kept ? "kept" : "dropped"}`, tabindex: "-1", role: "button", transform: `translate(${node.x} ${node.y})`,
      "aria-label": `Chunk ${column + 1}, ${node.kept ? "kept" : "dropped"}${score && `, score ${score}`}: ${node.chunk}` },
      draw("rect", { width: WIDE, height: HIGH, rx: 5 }),
      draw("text", { class: "score", x: 8, y: 16 }, score),
      draw("svg", { x: score ? 54 : 8, width: WIDE - (score ? 60 : 14), height: HIGH }, draw("text", { y: 16 }, short)));
    explains(node.element, () => aboutDraft(node));
    this.marks.append(node.element);
    if (parent) this.connect(node);
    return node;
  }

  connect(node) {
    const [x, y, u, v] = [node.parent.x + WIDE, node.parent.y + HIGH / 2, node.x, node.y + HIGH / 2];
    node.edge = draw("path", { class: `edge ${node.kept ? "kept" : ""}`, d: `M${x} ${y}C${x + ACROSS / 2} ${y} ${u - ACROSS / 2} ${v} ${u} ${v}` });
    this.edges.append(node.edge);
  }

  title(column, nodes) {
    const kept = nodes.filter((n) => n.kept).length;
    this.marks.append(draw("text", { class: "column-title", x: column * (WIDE + ACROSS) + 2, y: 14 }, `chunk ${column + 1}: ${kept} of ${nodes.length} kept`));
  }

  resize() {
    const following = this.scroll.scrollLeft + this.scroll.clientWidth >= this.scroll.scrollWidth - WIDE;
    this.height = Math.max(this.height, TOP + this.columns.at(-1).length * (HIGH + GAP));
    this.svg.setAttribute("width", this.columns.length * (WIDE + ACROSS) - ACROSS + 4);
    this.svg.setAttribute("height", this.height + 2);
    this.scroll.hidden = this.legend.hidden = false;
    if (following) this.scroll.scrollLeft = this.scroll.scrollWidth;
  }

  /** The search is over and `text` is its answer: show the way to it. */
  finish(text) {
    const last = this.columns.at(-1) ?? [];
    let node = last.find((n) => n.kept && n.text === text) ?? last.find((n) => n.kept);
    for (; node; node = node.parent) {
      node.won = true;
      node.element.classList.add("won");
      node.element.setAttribute("aria-label", `${node.element.getAttribute("aria-label")} (became the answer)`);
      if (node.edge) {
        node.edge.classList.add("won");
        this.edges.append(node.edge);
      }
    }
    this.words.textContent = this.summary();
  }

  summary() {
    const drafts = this.nodes.length, kept = this.nodes.filter((n) => n.kept).length;
    if (!drafts) return "";
    if (this.columns.every((c) => c.length === 1)) return "This method writes one draft only, so there is nothing to choose from: the tree is a line.";
    return `${count(this.columns.length, "chunk")}, ${count(drafts, "draft")} tried, ${kept} kept. ` +
      "Each column is one chunk, best on top; lines lead from a draft to its continuations.";
  }

  /** Arrow keys: up and down in a column, left to where a draft comes from, right to its best continuation. */
  next(key, at) {
    const node = this.nodes[at], column = this.columns[node.column];
    const to = {
      ArrowUp: () => column[node.row - 1],
      ArrowDown: () => column[node.row + 1],
      ArrowLeft: () => node.parent ?? this.columns[node.column - 1]?.[0],
      ArrowRight: () => this.nodes.find((n) => n.parent === node) ?? this.columns[node.column + 1]?.[0],
      Home: () => this.columns[0][0],
      End: () => this.columns.at(-1)[0],
    }[key]?.();
    return to ? this.nodes.indexOf(to) : null;
  }
}
