// The settings: controls, their defaults for each method, the link that stores them, and the request bodies.

import { CONTROLS, WHOLE, slider } from "./controls.js";
import { byId } from "./dom.js";
import { methodList, methodOptions, sentence } from "./methods.js";
import { Mix, nonzero } from "./mix.js";
import { explained } from "./words.js";

const SEARCH = ["beta", "width", "successors", "chunk_length"];
const INSTRUCTIONS = ["contrast", "negative"];
const LINKED = { prompt: "p", method: "m", seed: "s", contrast: "i", negative: "o", system: "y", ...Object.fromEntries(CONTROLS.map((k) => [k.id, k.letter])) };
const SENTENCE = 40; // tokens that an answer may be longer, to the end of its sentence

/** All controls of the form. */
export class Settings {
  /** @param {object} listing the response of v1/models */
  constructor(listing) {
    this.model = listing.data[0].id;
    this.methods = new Map(listing.data.slice(1).map((entry) => [entry.ivg.method, entry.ivg]));
    const fallback = listing.data[0].ivg;
    this.methods.set(fallback.method, fallback);
    this.start = fallback.method;
    this.server = listing.ivg;
    ({ limits: this.limits, values: this.values, defaults: this.defaults, chat: this.chat } = listing.ivg);
    this.build();
    this.resetAll();
  }

  /** The value that scores answers where the method has none of its own. */
  get scorer() {
    return ["explicit", "reward"].find((name) => this.values.includes(name)) ?? null;
  }

  get method() {
    return this.methods.get(byId("method").value);
  }

  build() {
    const known = [...this.methods.values()].filter((m) => m.method !== "base");
    byId("method").replaceChildren(...methodOptions(known, this.server.levels));
    byId("method-list").replaceChildren(...methodList(known, this.server.levels, (name) => this.choose(name)));
    byId("method").value = this.start === "base" ? known[0]?.method : this.start;
    byId("sliders").replaceChildren(...CONTROLS.map((k) => slider({ ...k, max: this.most(k) })));
    byId("sentence-field").hidden = !this.server.end_at_sentence;
    const tokens = { level: "weight", single: "token", several: "weights", names: this.server.guides };
    const chunks = { level: "select", single: "select", several: "select_weights", names: this.values };
    this.tokenMix = new Mix({ ...tokens, box: byId("mix") });
    this.chunkMix = new Mix({ ...chunks, box: byId("select-mix") });
    byId("prompt-label").textContent = this.chat ? "Message" : "Prompt";
    byId("system-field").hidden = !this.chat;
  }

  /** Choose a method, as by the menu. */
  choose(name) {
    byId("method").value = name;
    byId("method").dispatchEvent(new Event("change", { bubbles: true }));
    byId("method").focus();
  }

  most({ id, max }) {
    if (id === "max_tokens") return Math.min(max, this.limits.max_tokens ?? max);
    return max;
  }

  /** Reset all settings to the defaults of the method and of the server. */
  resetAll() {
    byId("temperature").value = this.defaults.temperature ?? 1;
    byId("max_tokens").value = this.defaults.max_new_tokens ?? 50;
    byId("sentence").checked = true;
    this.resetMethod();
  }

  /** Reset the settings of the search to the defaults of the method. */
  resetMethod() {
    const m = this.method;
    for (const id of SEARCH) byId(id).value = m[id] ?? WHOLE;
    for (const mix of [this.tokenMix, this.chunkMix]) mix.reset(m);
    for (const id of INSTRUCTIONS) byId(id).value = m[id] ?? byId(id).value;
    this.refresh();
  }

  /** Weights of the token guides if they differ from the method's; null otherwise. */
  get customWeights() {
    return this.tokenMix.changed(this.method);
  }

  get hasGuidance() {
    return this.customWeights ? Object.values(this.customWeights).some(Boolean) : Boolean(this.method.token || Object.keys(this.method.weights ?? {}).length);
  }

  /** Does the method use the value that reads an instruction? */
  get hasInstruction() {
    const { token, select, weights, select_weights } = this.method;
    return [token, select, ...Object.keys({ ...weights, ...select_weights })].includes("contrast") && !this.values.includes("contrast");
  }

  get hasSelection() {
    return Boolean(this.method.select || Object.keys(this.method.select_weights ?? {}).length);
  }

  /** Update labels, help texts and disabled controls. */
  refresh() {
    const m = this.method, value = (id) => Number(byId(id).value), alone = m.rule === "reject";
    byId("method-help").replaceChildren(...explained(sentence(m.summary)));
    for (const input of document.querySelectorAll("#settings input[type=range]")) {
      const whole = input.id === "chunk_length" && Number(input.value) >= WHOLE;
      const text = whole ? "whole answer" : String(Number(input.value)).replace("-", "−");
      byId(`${input.id}-value`).textContent = text;
      input.setAttribute("aria-valuetext", text);
    }
    this.enable("beta", this.hasGuidance, "This method has no token guidance.");
    for (const id of ["width", "successors"]) this.enable(id, this.hasSelection && !alone, "This method has no value to select beams; it writes one beam.");
    this.enable("chunk_length", this.hasSelection, "This method has no selection.");
    const beams = value("width") * value("successors"), most = this.limits.max_hypotheses ?? Infinity;
    if (this.hasSelection && !alone) {
      const over = beams > most ? ` This server allows ${most}.` : "";
      byId("successors-help").textContent = `W · K = ${beams} beams at a time.${over}`;
    }
    byId("instruction").hidden = !this.hasInstruction;
    byId("mix").hidden = this.tokenMix.names.length < 2;
    byId("select-mix").hidden = this.values.length < 2 || !this.hasSelection;
    byId("guided-sub").textContent = m.method === "ivg" ? "Integrated Value Guidance" : m.method;
  }

  enable(id, on, why) {
    byId(id).disabled = !on;
    byId(id).closest(".field").classList.toggle("off", !on);
    byId(`${id}-help`).textContent = on ? CONTROLS.find((k) => k.id === id).help : why;
  }

  // Requests

  /**
   * Both requests, and which values score the answers.
   * @param {import("./chat.js").Conversation} conversation what was said before
   */
  requests(conversation) {
    const scorer = this.scorerName;
    return {
      unguided: this.body(conversation.base, { method: "base", ...this.scoring }),
      guided: this.body(conversation.guided, { ...this.guidance, ...(this.hasSelection ? {} : this.scoring) }),
      scoring: { scorer, guidedScorer: scorer, scoredOnly: this.scoredOnly },
    };
  }

  /** The guided request as other programs send it: without what only scores the answer. */
  plainRequest(conversation) {
    return this.body(conversation.guided, this.guidance);
  }

  body(turns, guidance) {
    const number = (id) => Number(byId(id).value), prompt = byId("prompt").value, system = byId("system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...turns, { role: "user", content: prompt }];
    return {
      model: this.model, ...(this.chat ? { messages } : { prompt }),
      temperature: number("temperature"), max_tokens: this.longest, seed: number("seed"),
      guidance: { ...guidance, ...(this.wholeSentences ? { end_at_sentence: number("max_tokens") } : {}) },
    };
  }

  get wholeSentences() {
    return this.server.end_at_sentence && byId("sentence").checked;
  }

  /** Tokens that an answer may have. */
  get longest() {
    const length = Number(byId("max_tokens").value);
    return this.wholeSentences ? Math.min(length + SENTENCE, this.limits.max_tokens ?? Infinity) : length;
  }

  /** What selects in the guided request, else what can score both answers. */
  get scoring() {
    const { select, select_weights, select_combine, select_reference } = this.method;
    const set = this.hasSelection ? this.chunkMix.changed(this.method) : null, several = nonzero(set ?? select_weights ?? {});
    if (![select, ...Object.keys(several)].some((name) => this.values.includes(name))) return this.scorer ? { select_value: this.scorer } : {};
    if (!Object.keys(several).length) return { select_value: select };
    return { select_weights: several, ...(select_combine === "min" ? { select_combine, select_reference } : {}) };
  }

  /** Method and settings of the guided request. */
  get guidance() {
    const m = this.method, guidance = { method: m.method };
    if (this.hasInstruction) for (const id of INSTRUCTIONS) if (byId(id).value.trim()) guidance[id] = byId(id).value;
    if (this.hasGuidance) guidance.beta = Number(byId("beta").value);
    if (this.customWeights && this.hasGuidance) guidance.weights = nonzero(this.customWeights);
    else if (this.customWeights) guidance.token_value = "none";
    if (!this.hasSelection) return guidance;
    if (m.rule !== "reject") for (const id of ["width", "successors"]) guidance[id] = Number(byId(id).value);
    const length = Number(byId("chunk_length").value), set = this.chunkMix.changed(m);
    if (length < WHOLE) guidance.chunk_length = length;
    else if (m.chunk_length !== null) guidance.chunk_length = this.longest;
    if (set && Object.values(set).some(Boolean)) guidance.select_weights = nonzero(set);
    else if (set) guidance.select_value = "none"; // the server says what is missing
    return guidance;
  }

  /** Does the scoring value only score the guided answer, without being part of the method? */
  get scoredOnly() {
    const used = this.customWeights ? Boolean(this.customWeights[this.scorer]) : this.method.token === this.scorer;
    return !this.hasSelection && !used;
  }

  /** What the score of both answers is made of, in words. */
  get scorerName() {
    const { select_value, select_weights, select_combine } = this.scoring;
    if (!select_weights) return select_value ?? null;
    const parts = Object.entries(select_weights).map(([name, w]) => (w === 1 ? name : `${w} · ${name}`));
    return select_combine === "min" ? `worst of ${parts.join(" and ")}` : parts.join(" + ").replaceAll("+ -", "− ");
  }

  /** The values of the method, where the recipe of the server and not the table of methods may name them. */
  get ownValues() {
    if (this.server.embedded && this.method.method !== "custom") return {};
    const { token, select, weights, select_weights, select_combine } = this.method, some = (w) => Object.keys(w ?? {}).length > 0;
    return {
      ...(token ? { token } : {}), ...(select ? { select } : {}),
      ...(some(weights) ? { weights } : {}), ...(some(select_weights) ? { select_weights, select_combine } : {}),
    };
  }

  // The link

  get hash() {
    const link = new URLSearchParams(Object.entries(LINKED).filter(([id]) => id !== "system" || this.chat).map(([id, letter]) => [letter, byId(id).value]));
    const [x, z] = [this.tokenMix, this.chunkMix].map((mix) => mix.write(this.method));
    if (x) link.set("x", x);
    if (z) link.set("z", z);
    if (!byId("sentence").checked) link.set("e", "0");
    return `#${link}`;
  }

  /** Set the controls from a link; settings that it lacks stay. */
  restore(hash) {
    const link = new URLSearchParams(hash.replace(/^#/, ""));
    const method = link.get("m");
    if (method && this.methods.has(method) && method !== "base") byId("method").value = method;
    if (method) this.resetMethod();
    for (const [id, letter] of Object.entries(LINKED)) if (id !== "method" && link.has(letter)) byId(id).value = link.get(letter);
    this.tokenMix.read(link.get("x"));
    this.chunkMix.read(link.get("z"));
    if (method || link.has("e")) byId("sentence").checked = link.get("e") !== "0";
    this.refresh();
    return method && !this.methods.has(method) ? `This server has no method “${method}”; the other settings of the link were applied.` : null;
  }

  /** The control for a field of the request body. */
  static control(param) {
    const name = (param ?? "").replace(/^guidance\./, "").replace(/^messages.*/, "prompt");
    const other = { token_value: "method", select_value: "method", weights: "mix", select_weights: "select-mix", W: "width", K: "successors", L: "chunk_length" };
    return byId(other[name] ?? name);
  }

  /** The label of a control. */
  static label(control) {
    return control.labels?.[0]?.textContent ?? control.querySelector("legend")?.textContent ?? "";
  }
}
