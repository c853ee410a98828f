// One pane: an answer as it grows, token by token, and what it cost. Knows events of the wire, not how they are asked for.

import { along, count, figure, make, roving } from "./dom.js";
import { aboutToken, close, explains } from "./pop.js";

/** An answer on the page. */
export class Answer {
  /** @param {HTMLElement} section with `.answer` and `.facts` */
  constructor(section) {
    this.text = section.querySelector(".answer");
    this.facts = section.querySelector(".facts");
    roving(this.text, () => [...this.text.querySelectorAll(".tok")], along);
    this.clear();
  }

  clear() {
    Object.assign(this, { committed: "", details: [], draft: [], spans: [], started: performance.now(), first: null, end: null });
  }

  /** A new answer to `prompt` begins. */
  begin(prompt) {
    this.clear();
    close();
    this.text.classList.remove("empty");
    this.text.setAttribute("aria-busy", "true");
    this.tail = document.createTextNode("");
    this.text.replaceChildren(make("span", { class: "asked" }, prompt), this.tail);
    this.facts.replaceChildren();
  }

  /** Take one event of the wire. */
  take({ type, data }) {
    if (type === "text") {
      this.first ??= (performance.now() - this.started) / 1000;
      this.committed += data;
    } else if (type === "tokens") this.details.push(...data);
    else if (type === "beams") this.draft = best(data.kept);
    else this.end = { ...this.end, ...data };
    this.render();
    this.account(null);
  }

  /** Nothing more will come. What was a draft only goes, except where the server never came to commit it. */
  finish() {
    this.text.setAttribute("aria-busy", "false");
    if (this.end) this.draft = [];
    this.render();
    if (this.committed || this.spans.length || this.end) return;
    this.text.classList.add("empty");
    this.text.replaceChildren("No answer.");
  }

  /** Tokens to be shown: those that are settled, in detail, then those of the best draft. */
  get tokens() {
    const settled = this.details.map((t) => ({ ...t, tentative: false }));
    let at = this.details.reduce((n, t) => n + t.text.length, 0), seen = 0;
    for (const t of this.draft) {
      seen += t.text.length;
      if (seen > at) settled.push({ ...t, tentative: seen > this.committed.length });
    }
    return settled.filter((t) => t.text);
  }

  /** Spans stay where they are as long as they can, so that focus does not get lost. */
  render() {
    const tokens = this.tokens;
    tokens.forEach((token, i) => {
      const span = this.spans[i] ?? this.add();
      if (span.firstChild?.data !== token.text) span.textContent = token.text;
      span.className = `tok ${look(token)}${span.classList.contains("open") ? " open" : ""}`;
      span.token = token;
    });
    for (const span of this.spans.splice(tokens.length)) span.remove();
    this.tail.data = this.committed.slice(tokens.reduce((n, t) => n + t.text.length, 0));
  }

  add() {
    const span = make("span", { role: "button", tabindex: this.spans.length ? "-1" : "0" });
    explains(span, () => aboutToken(span.token));
    this.spans.push(span);
    this.tail.before(span);
    return span;
  }

  /**
   * What it cost, as far as that is known.
   * @param {{score: number|null, judge: string|null, read: number, ratio: number|null, share: number, usage: object}|null} cost
   * @param {string|null} note why it ended, if not by itself
   */
  account(cost, note = null) {
    const rows = [];
    const row = (name, value) => rows.push(make("dt", {}, name), make("dd", {}, ...[value].flat()));
    const score = cost?.score ?? null;
    if (score !== null) row("Score", [make("span", { class: "big" }, figure(score)), make("span", { class: "sub" }, ` by the value “${cost.judge}”; higher is better`)]);
    if (!cost) row("Written", this.words);
    if (cost) {
      const bar = make("i");
      bar.style.width = `${Math.max(1, 100 * cost.share)}%`;
      const parts = Object.entries(cost.usage).map(([name, n]) => `${name} ${n.toLocaleString("en")}`).join(" · ");
      row("Cost", [cost.ratio === null ? "" : `${figure(cost.ratio, cost.ratio < 10 ? 1 : 0)} × plain sampling`, make("span", { class: "cost", "aria-hidden": "true" }, bar)]);
      row("Tokens read", `${cost.read.toLocaleString("en")} (${parts})`);
    }
    if (this.first !== null) row("First text", `${figure(this.first)} s`);
    if (this.end?.seconds !== undefined) row("Whole answer", `${figure(this.end.seconds)} s`);
    const why = { stop: "the text ended", length: "longest length reached" }[this.end?.finish];
    if (note ?? why) row("Ended", note ?? why);
    this.facts.replaceChildren(...rows);
  }

  /** How much there is. */
  get words() {
    return count(this.tokens.filter((t) => !t.tentative).length, "token");
  }
}

/** Tokens of the best kept draft, as far as the server tells them. */
function best(kept) {
  const first = kept.reduce((a, b) => (!a || (b.score ?? 0) > (a.score ?? 0) ? b : a), null);
  return first ? first.tokens.map((text, i) => ({ text, shift: first.shift[i] ?? 0 })) : [];
}

/** Classes of a token: direction, and strength in four steps; below 0.1 nats none. */
export function look({ shift, tentative }) {
  if (tentative) return "tentative";
  const size = Math.abs(shift);
  if (size < 0.1) return "";
  return `${shift > 0 ? "up" : "down"} s${size < 0.5 ? 1 : size < 1.5 ? 2 : size < 3 ? 3 : 4}`;
}
