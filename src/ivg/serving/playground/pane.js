// One pane: an answer as it is streamed, and its cost.

import { along, count, formatNumber, make, roving } from "./dom.js";
import { tokenContent, close, attachPopover } from "./popover.js";

/** A pane with an answer. */
export class Pane {
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

  /** Start a new answer to `prompt`. */
  begin(prompt) {
    this.clear();
    close();
    this.text.classList.remove("empty");
    this.text.setAttribute("aria-busy", "true");
    this.tail = document.createTextNode("");
    this.text.replaceChildren(make("span", { class: "prompt" }, prompt), this.tail);
    this.facts.replaceChildren();
  }

  /** Handle one event of the API. */
  update({ type, data }) {
    if (type === "text") {
      this.first ??= (performance.now() - this.started) / 1000;
      this.committed += data;
    } else if (type === "tokens") this.details.push(...data);
    else if (type === "beams") this.draft = bestDraft(data.kept);
    else this.end = { ...this.end, ...data };
    this.render();
    this.showCost(null);
  }

  /** The stream has ended. Text that is only a draft is removed if the answer is complete. */
  finish() {
    this.text.setAttribute("aria-busy", "false");
    if (this.end) this.draft = [];
    this.render();
    if (this.committed || this.spans.length || this.end) return;
    this.text.classList.add("empty");
    this.text.replaceChildren("No answer.");
  }

  /** Tokens to show: the committed ones with details, then those of the best draft. */
  get tokens() {
    const tokens = this.details.map((t) => ({ ...t, tentative: false }));
    let at = this.details.reduce((n, t) => n + t.text.length, 0), seen = 0;
    for (const t of this.draft) {
      seen += t.text.length;
      if (seen > at) tokens.push({ ...t, tentative: seen > this.committed.length });
    }
    return tokens.filter((t) => t.text);
  }

  /** Reuses the spans, so that the focus is not lost. */
  render() {
    const tokens = this.tokens;
    tokens.forEach((token, i) => {
      const span = this.spans[i] ?? this.add();
      if (span.firstChild?.data !== token.text) span.textContent = token.text;
      span.className = `tok ${tokenClass(token)}${span.classList.contains("open") ? " open" : ""}`;
      span.token = token;
    });
    for (const span of this.spans.splice(tokens.length)) span.remove();
    this.tail.data = this.committed.slice(tokens.reduce((n, t) => n + t.text.length, 0));
  }

  add() {
    const span = make("span", { role: "button", tabindex: this.spans.length ? "-1" : "0" });
    attachPopover(span, () => tokenContent(span.token));
    this.spans.push(span);
    this.tail.before(span);
    return span;
  }

  /**
   * Show the cost, as far as it is known.
   * @param {{score: number|null, scorer: string|null, read: number, ratio: number|null, share: number, usage: object}|null} cost
   * @param {string|null} note why the answer is incomplete
   */
  showCost(cost, note = null) {
    const rows = [];
    const row = (name, value) => rows.push(make("dt", {}, name), make("dd", {}, ...[value].flat()));
    const score = cost?.score ?? null;
    if (score !== null) row("Score", [make("span", { class: "big" }, formatNumber(score)), make("span", { class: "sub" }, ` by the value “${cost.scorer}”; higher is better`)]);
    if (!cost) row("Length", this.length);
    if (cost) {
      const bar = make("i");
      bar.style.width = `${Math.max(1, 100 * cost.share)}%`;
      const parts = Object.entries(cost.usage).map(([name, n]) => `${name} ${n.toLocaleString("en")}`).join(" · ");
      row("Cost", [cost.ratio === null ? "" : `${formatNumber(cost.ratio, cost.ratio < 10 ? 1 : 0)} × plain sampling`, make("span", { class: "cost", "aria-hidden": "true" }, bar)]);
      row("Tokens read", `${cost.read.toLocaleString("en")} (${parts})`);
    }
    if (this.first !== null) row("First text", `${formatNumber(this.first)} s`);
    if (this.end?.seconds !== undefined) row("Total time", `${formatNumber(this.end.seconds)} s`);
    const why = { stop: "end of text", length: "maximum length" }[this.end?.finish];
    if (note ?? why) row("Ended", note ?? why);
    this.facts.replaceChildren(...rows);
  }

  /** Number of committed tokens, in words. */
  get length() {
    return count(this.tokens.filter((t) => !t.tentative).length, "token");
  }
}

/** Tokens of the best kept draft. */
function bestDraft(kept) {
  const first = kept.reduce((a, b) => (!a || (b.score ?? 0) > (a.score ?? 0) ? b : a), null);
  return first ? first.tokens.map((text, i) => ({ text, shift: first.shift[i] ?? 0 })) : [];
}

/** CSS classes of a token: direction and strength of its shift; none below 0.1 nats. */
export function tokenClass({ shift, tentative }) {
  if (tentative) return "tentative";
  const size = Math.abs(shift);
  if (size < 0.1) return "";
  return `${shift > 0 ? "up" : "down"} s${size < 0.5 ? 1 : size < 1.5 ? 2 : size < 3 ? 3 : 4}`;
}
