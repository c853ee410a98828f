// The search tree as SVG: one column per chunk, best beam on top.

import { count, draw, formatNumber, roving, shorten, visible } from "./dom.js";
import { beamContent, attachPopover } from "./popover.js";

const [WIDTH, HEIGHT, GAP, COLUMN_GAP, TOP] = [170, 24, 5, 40, 24];
const [TEXT_AT, TEXT_END] = [54, 6];

/** The growing tree. */
export class Tree {
  /** @param {{scroll: HTMLElement, summaryText: HTMLElement, legend: HTMLElement}} parts */
  constructor(parts) {
    Object.assign(this, parts);
    roving(this.scroll, () => this.nodes.map((n) => n.element), (key, at) => this.next(key, at));
    this.clear();
  }

  clear() {
    Object.assign(this, { columns: [], nodes: [], byKey: new Map(), height: 0 });
    this.edges = draw("g");
    this.marks = draw("g");
    this.svg = draw("svg", { role: "group", "aria-label": "Tree of beams" }, this.edges, this.marks);
    this.scroll.replaceChildren(this.svg);
    this.scroll.hidden = this.legend.hidden = true;
  }

  /** Add a column. */
  update({ kept, dropped }) {
    const column = this.columns.length;
    const beams = [...kept.map((n) => ({ ...n, kept: true })), ...dropped.map((n) => ({ ...n, kept: false }))]
      .sort((a, b) => (b.score ?? 0) - (a.score ?? 0) || b.kept - a.kept);
    const before = this.byKey;
    this.byKey = new Map();
    const nodes = beams.map((beam, row) => this.node(beam, column, row, before.get(beam.key) ?? before.get(beam.parent)));
    for (const node of nodes) this.byKey.set(node.key, node);
    this.columns.push(nodes);
    this.nodes.push(...nodes);
    if (column === 0 && nodes.length) nodes[0].element.setAttribute("tabindex", "0");
    this.title(column, nodes);
    this.resize();
    const best = beams.find((d) => d.score !== null)?.score;
    const about = best === undefined ? "" : `; best score ${formatNumber(best)}`;
    this.summaryText.textContent = `Chunk ${column + 1}: ${kept.length} kept, ${dropped.length} dropped${about}.`;
  }

  node(beam, column, row, parent) {
    const begin = parent && beam.text.startsWith(parent.text) ? parent.text.length : 0;
    const node = { ...beam, column, row, parent, chunk: beam.text.slice(begin), won: false };
    node.x = column * (WIDTH + COLUMN_GAP) + 2;
    node.y = TOP + row * (HEIGHT + GAP);
    const score = node.score === null ? "" : formatNumber(node.score), x = score ? TEXT_AT : 8, space = WIDTH - x - TEXT_END;
    const short = shorten(visible(node.chunk.trim()), space, getComputedStyle(this.svg).font);
    node.element = draw("g", { class: `node ${node.kept ? "kept" : "dropped"}`, tabindex: "-1", role: "button", transform: `translate(${node.x} ${node.y})`,
      "aria-label": `Chunk ${column + 1}, ${node.kept ? "kept" : "dropped"}${score && `, score ${score}`}: ${node.chunk}` },
      draw("rect", { width: WIDTH, height: HEIGHT, rx: 5 }),
      draw("text", { class: "score", x: 8, y: 16 }, score),
      draw("svg", { x, width: space, height: HEIGHT }, draw("text", { y: 16 }, short)));
    attachPopover(node.element, () => beamContent(node));
    this.marks.append(node.element);
    if (parent) this.connect(node);
    return node;
  }

  connect(node) {
    const [x, y, u, v] = [node.parent.x + WIDTH, node.parent.y + HEIGHT / 2, node.x, node.y + HEIGHT / 2];
    node.edge = draw("path", { class: `edge ${node.kept ? "kept" : ""}`, d: `M${x} ${y}C${x + COLUMN_GAP / 2} ${y} ${u - COLUMN_GAP / 2} ${v} ${u} ${v}` });
    this.edges.append(node.edge);
  }

  title(column, nodes) {
    const kept = nodes.filter((n) => n.kept).length;
    this.marks.append(draw("text", { class: "column-title", x: column * (WIDTH + COLUMN_GAP) + 2, y: 14 }, `chunk ${column + 1}: ${kept} of ${nodes.length} kept`));
  }

  resize() {
    const following = this.scroll.scrollLeft + this.scroll.clientWidth >= this.scroll.scrollWidth - WIDTH;
    this.height = Math.max(this.height, TOP + this.columns.at(-1).length * (HEIGHT + GAP));
    this.svg.setAttribute("width", this.columns.length * (WIDTH + COLUMN_GAP) - COLUMN_GAP + 4);
    this.svg.setAttribute("height", this.height + 2);
    this.scroll.hidden = this.legend.hidden = false;
    if (following) this.scroll.scrollLeft = this.scroll.scrollWidth;
  }

  /** The search has ended: highlight the path to its answer `text`. */
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
    this.summaryText.textContent = this.summary();
  }

  summary() {
    const beams = this.nodes.length, kept = this.nodes.filter((n) => n.kept).length;
    if (!beams) return "";
    if (this.columns.every((c) => c.length === 1)) return "This method writes a single beam, so the tree is a line.";
    return `${count(this.columns.length, "chunk")}, ${count(beams, "beam")} tried, ${kept} kept. ` +
      "Each column is one chunk, best on top; lines connect a beam with its continuations.";
  }

  /** Arrow keys: up and down in a column, left to the parent, right to the best continuation. */
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
