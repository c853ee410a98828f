// Runs: the unguided answer, then the guided one, so that neither slows the other; and what they cost.

import { complete } from "./api.js";
import { byId } from "./dom.js";
import { Pane } from "./pane.js";
import { Tree } from "./tree.js";

/** Both answers and the search tree. */
export class Runner {
  constructor() {
    this.base = new Pane(byId("base"));
    this.guided = new Pane(byId("guided"));
    this.tree = new Tree({ scroll: byId("tree-scroll"), summaryText: byId("tree-summary"), legend: byId("tree-legend") });
    this.control = null;
    this.done = null; // request of the unguided answer that is shown, as JSON
    this.count = 0; // of runs, recorded ones included
    this.asked = null; // the last live run: what was asked
  }

  stop() {
    this.control?.abort();
  }

  /**
   * Write both answers, one after the other. An unguided answer that is shown already, to the same request, is kept.
   * @param {{prompt: string, unguided: object, guided: object, scoring: object, turns: {base: object[], guided: object[]}|null, key: string}} asked
   * @returns {Promise<{error: Error|null, stopped: boolean}|null>} null: another run has begun
   */
  async run({ prompt, unguided, guided, scoring, turns, key }) {
    this.stop();
    const control = new AbortController(), request = JSON.stringify(unguided);
    this.control = control;
    this.count += 1;
    this.asked = { prompt, complete: false };
    this.tree.clear();
    byId("tree-summary").textContent = "Waiting for the first chunk.";
    byId("recorded").hidden = true;
    this.guided.wait(prompt, turns?.guided, "for the unguided answer, so that neither slows the other");
    let error = null;
    if (this.done !== request) {
      this.done = null;
      error = await this.generate(this.base, { body: unguided, prompt, turns: turns?.base, key }, control, null);
      if (this.control !== control) return null;
      if (!error && !control.signal.aborted) this.done = request;
    }
    this.showCosts(scoring, null);
    if (!error && !control.signal.aborted) error = await this.generate(this.guided, { body: guided, prompt, turns: turns?.guided, key }, control, this.tree);
    else this.guided.finish(error ? "Not asked, because the unguided answer failed." : "Not asked.");
    if (this.control !== control) return null;
    this.control = null;
    if (!this.tree.nodes.length) byId("tree-summary").textContent = "No chunk was completed.";
    const stopped = control.signal.aborted;
    this.asked.complete = !stopped && !error;
    this.showCosts(scoring, stopped ? "stopped by you" : error ? "by an error, see the message" : null);
    return { error, stopped };
  }

  /** Generate one answer; returns an error or null. */
  async generate(pane, { body, prompt, turns, key }, control, tree) {
    pane.begin(prompt, turns);
    pane.wanted = body.guidance.end_at_sentence ?? null;
    try {
      for await (const event of complete(body, { key, signal: control.signal })) {
        if (control.signal.aborted) break;
        pane.update(event);
        if (event.type === "beams") tree?.update(event.data);
      }
      if (!control.signal.aborted) tree?.finish(pane.committed);
    } catch (error) {
      if (!control.signal.aborted) return error;
    } finally {
      if (this.control === control) pane.finish(); // else another run has started in this pane
    }
    return null;
  }

  /** Show a run that was recorded. */
  play({ prompt, base, guided, made, scoring, end_at_sentence: wanted }) {
    this.stop();
    this.count += 1;
    this.control = this.done = this.asked = null;
    this.tree.clear();
    const recordedOn = `recorded on ${made}`;
    this.base.play(prompt, base, recordedOn, wanted);
    this.guided.play(prompt, guided, recordedOn, wanted);
    for (const event of guided) if (event.type === "beams") this.tree.update(event.data);
    this.tree.finish(this.guided.committed);
    this.tree.scroll.scrollLeft = 0;
    this.showCosts(scoring, null);
  }

  /**
   * Show the cost of both answers relative to plain sampling; a value that only scores an answer is not counted.
   * @param {{scorer: string|null, guidedScorer: string|null, scoredOnly: boolean}} scoring
   * @param {string|null} note why an answer is incomplete
   */
  showCosts(scoring, note) {
    const parts = (end, counts) => Object.entries(end?.usage ?? {}).filter(([name]) => counts(name));
    const sum = (some) => some.reduce((n, [, tokens]) => n + tokens, 0);
    const left = parts(this.base.end, (name) => name === "base");
    const right = parts(this.guided.end, (name) => !scoring.scoredOnly || name !== scoring.scorer);
    const plain = sum(left), most = Math.max(plain, sum(right), 1);
    const cost = (pane, some, scorer) => pane.end?.usage ? {
      score: pane.end.score, scorer, read: sum(some), ratio: plain ? sum(some) / plain : null, share: sum(some) / most, usage: Object.fromEntries(some),
    } : null;
    this.base.showCost(cost(this.base, left, scoring.scorer), this.base.end ? null : note);
    if (this.guided.end || note) this.guided.showCost(cost(this.guided, right, scoring.guidedScorer), this.guided.end ? null : note);
  }
}
