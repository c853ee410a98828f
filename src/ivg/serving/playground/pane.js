// One pane: an answer as it is streamed, and its cost.

import { along, count, formatNumber, make, roving } from "./dom.js";
import { showTurns } from "./chat.js";
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
    Object.assign(this, { committed: "", thinking: "", details: [], beam: [], spans: [], started: performance.now(), first: null, end: null, recordedOn: null, wanted: null });
  }

  /** Start a new answer to `prompt`; of a chat, behind the messages `turns`. */
  begin(prompt, turns = null) {
    this.clear();
    close();
    this.text.classList.remove("empty");
    this.text.setAttribute("aria-busy", "true");
    this.tail = document.createTextNode("");
    const said = turns ? showTurns([...turns, { role: "user", content: prompt }]) : [make("span", {}, prompt)];
    this.thought = make("p", { class: "thinking", hidden: "" });
    this.text.replaceChildren(make("div", { class: turns ? "prompt turns" : "prompt" }, ...said), this.thought, this.tail);
    this.facts.replaceChildren();
  }

  /** Another answer is written first. */
  wait(prompt, turns, why) {
    this.begin(prompt, turns);
    this.text.setAttribute("aria-busy", "false");
    this.tail.data = "";
    this.facts.replaceChildren(make("dt", {}, "Waits"), make("dd", {}, why));
  }

  /** Show an answer that was recorded. */
  play(prompt, events, recordedOn, wanted) {
    this.begin(prompt);
    Object.assign(this, { recordedOn, wanted });
    events.forEach((event) => this.update(event));
    this.finish();
  }

  /** Handle one event of the API. */
  update({ type, data }) {
    if (type === "text") {
      if (!this.recordedOn) this.first ??= (performance.now() - this.started) / 1000;
      this.committed += data;
    } else if (type === "thinking") {
      this.thinking += data;
    } else if (type === "tokens") this.details.push(...data);
    else if (type === "beams") this.beam = bestBeam(data.kept);
    else this.end = { ...this.end, ...data };
    this.render();
    this.showCost(null);
  }

  /** The stream has ended. Text that is only a beam is removed if the answer is complete. */
  finish(otherwise = "No answer.") {
    this.text.setAttribute("aria-busy", "false");
    if (this.end) this.beam = [];
    this.render();
    if (this.committed || this.spans.length || this.end) return;
    this.text.classList.add("empty");
    this.text.replaceChildren(otherwise);
  }

  /** Tokens to show: the committed ones with details, then those of the best beam. */
  get tokens() {
    if (this.thinking) return this.answerTokens;
    const tokens = this.details.map((t) => ({ ...t, tentative: false }));
    let at = this.details.reduce((n, t) => n + t.text.length, 0), seen = 0;
    for (const t of this.beam) { // of a search
      seen += t.text.length;
      if (seen > at) tokens.push({ ...t, tentative: seen > this.committed.length });
    }
    return tokens.filter((t) => t.text);
  }

  /** Tokens behind the thinking; they are known as such when the answer is complete. */
  get answerTokens() {
    let before = this.details.reduce((n, t) => n + t.text.length, 0) - this.committed.length;
    if (!this.end || before < 0) return [];
    return this.details.flatMap((t) => {
      const skip = Math.min(Math.max(before, 0), t.text.length);
      before -= t.text.length;
      return skip < t.text.length ? [{ ...t, text: t.text.slice(skip), tentative: false }] : [];
    });
  }

  /** Reuses the spans, so that the focus is not lost. */
  render() {
    this.thought.hidden = !this.thinking;
    this.thought.textContent = this.thinking;
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
    const why = this.ended;
    if (note ?? why) row("Ended", note ?? why);
    if (this.time) row("Time", this.time);
    this.facts.replaceChildren(...rows);
  }

  /** Why the answer ends where it does, in words; null while it is unknown. */
  get ended() {
    const long = this.wanted && this.details.length >= this.wanted;
    if (this.end?.finish === "stop") return long ? "end of the sentence, the length is reached" : "the model ended its text";
    if (this.end?.finish === "length") return this.wanted ? "maximum length, inside a sentence" : "maximum length";
    return null;
  }

  /** How long it took, in words; null while it is unknown. */
  get time() {
    const first = this.first === null ? "" : `first text after ${formatNumber(this.first)} s`;
    if (this.end?.seconds === undefined) return first || null;
    const note = [this.recordedOn, first].filter(Boolean).join("; ");
    return `${formatNumber(this.end.seconds)} s in all${note && `; ${note}`}`;
  }

  /** Number of committed tokens, in words. */
  get length() {
    return count(this.tokens.filter((t) => !t.tentative).length, "token");
  }
}

/** Tokens of the best kept beam. */
function bestBeam(kept) {
  const first = kept.reduce((a, b) => (!a || (b.score ?? 0) > (a.score ?? 0) ? b : a), null);
  return first?.tokens ? first.tokens.map((text, i) => ({ text, shift: first.shift[i] ?? 0 })) : [];
}

/** CSS classes of a token: direction and strength of its shift; none below 0.1 nats. */
export function tokenClass({ shift, tentative }) {
  if (tentative) return "tentative";
  const size = Math.abs(shift);
  if (size < 0.1) return "";
  return `${shift > 0 ? "up" : "down"} s${size < 0.5 ? 1 : size < 1.5 ? 2 : size < 3 ? 3 : 4}`;
}
