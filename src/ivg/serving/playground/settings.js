// The controls: what can be set, its default for each method, the link that carries it, the request that it makes.

import { byId, make } from "./dom.js";

const KNOBS = [
  { id: "beta", letter: "b", label: "Guide strength β", help: "0 leaves every word to the model alone; more pushes harder.", min: 0, max: 4, step: 0.1 },
  { id: "width", letter: "w", label: "Drafts kept W", help: "So many drafts survive each round.", min: 1, max: 16, step: 1 },
  { id: "successors", letter: "k", label: "Continuations of each K", help: "So many ways every kept draft goes on.", min: 1, max: 16, step: 1 },
  { id: "chunk_length", letter: "l", label: "Chunk length L", help: "Tokens written between two selections.", min: 1, max: 51, step: 1 },
  { id: "temperature", letter: "t", label: "Temperature", help: "0 always takes the likeliest word; more wanders more.", min: 0, max: 2, step: 0.05 },
  { id: "max_tokens", letter: "n", label: "Longest answer", help: "In tokens, about ¾ of a word each.", min: 1, max: 200, step: 1 },
];
const WHOLE = 51;
const SEARCH = ["beta", "width", "successors", "chunk_length"];
const LINKED = { prompt: "p", method: "m", seed: "s", ...Object.fromEntries(KNOBS.map((k) => [k.id, k.letter])) };

/** All controls of the form. */
export class Settings {
  /** @param {object} listing what v1/models says */
  constructor(listing) {
    this.model = listing.data[0].id;
    this.methods = new Map(listing.data.slice(1).map((entry) => [entry.ivg.method, entry.ivg]));
    const fallback = listing.data[0].ivg;
    if (!this.methods.has(fallback.method)) this.methods.set(fallback.method, fallback);
    this.methods.set(fallback.method, fallback);
    this.start = fallback.method;
    ({ limits: this.limits, values: this.values, defaults: this.defaults } = { limits: {}, values: [], defaults: {}, ...listing.ivg });
    this.build();
    this.toDefaults();
  }

  get judge() {
    return ["explicit", "reward"].find((name) => this.values.includes(name)) ?? null;
  }

  get method() {
    return this.methods.get(byId("method").value);
  }

  build() {
    const known = [...this.methods.values()].filter((m) => m.method !== "base");
    byId("method").replaceChildren(...known.map((m) => make("option", { value: m.method }, named(m))));
    byId("method").value = this.start === "base" ? known[0]?.method : this.start;
    byId("knobs").replaceChildren(...KNOBS.map((k) => knob({ ...k, max: this.most(k) })));
    byId("weights").replaceChildren(...this.values.map((name) => knob({ id: `weight-${name}`, label: name, min: -2, max: 2, step: 0.1 })));
    byId("mix").hidden = this.values.length < 2;
  }

  most({ id, max }) {
    if (id === "max_tokens") return Math.min(max, this.limits.max_tokens ?? max);
    return max;
  }

  /** The current method's own settings, and the server's sampling. */
  toDefaults() {
    byId("temperature").value = this.defaults.temperature ?? 1;
    byId("max_tokens").value = this.defaults.max_new_tokens ?? 50;
    this.toMethod();
  }

  /** What the current method has of its own. */
  toMethod() {
    const m = this.method;
    for (const id of SEARCH) byId(id).value = m[id] ?? WHOLE;
    for (const name of this.values) byId(`weight-${name}`).value = this.ownWeight(name);
    this.refresh();
  }

  ownWeight(name) {
    const { token, weights } = this.method;
    if (weights && Object.keys(weights).length) return weights[name] ?? 0;
    return token === name ? 1 : 0;
  }

  /** The mix, where it is not the method's own; null otherwise. */
  get mix() {
    const mix = Object.fromEntries(this.values.map((name) => [name, Number(byId(`weight-${name}`).value)]));
    return this.values.some((name) => mix[name] !== this.ownWeight(name)) ? mix : null;
  }

  get guides() {
    return this.mix ? Object.values(this.mix).some(Boolean) : Boolean(this.method.token || Object.keys(this.method.weights ?? {}).length);
  }

  get selects() {
    return Boolean(this.method.select || Object.keys(this.method.select_weights ?? {}).length);
  }

  /** Say in words what the controls mean now. */
  refresh() {
    const m = this.method, value = (id) => Number(byId(id).value), alone = m.rule === "reject";
    byId("method-help").textContent = `${m.summary[0].toUpperCase()}${m.summary.slice(1)}.`;
    for (const input of document.querySelectorAll("#settings input[type=range]")) {
      const whole = input.id === "chunk_length" && Number(input.value) >= WHOLE;
      const text = whole ? "whole answer" : String(Number(input.value)).replace("-", "−");
      byId(`${input.id}-value`).textContent = text;
      input.setAttribute("aria-valuetext", text);
    }
    this.enable("beta", this.guides, "This method guides no single words.");
    for (const id of ["width", "successors"]) this.enable(id, this.selects && !alone, "This method writes one draft: it has no value to choose by.");
    this.enable("chunk_length", this.selects, "This method never stops to choose.");
    const drafts = value("width") * value("successors"), most = this.limits.max_hypotheses ?? Infinity;
    if (this.selects && !alone) {
      const over = drafts > most ? ` This server allows ${most}.` : "";
      byId("successors-help").textContent = `W · K = ${drafts} drafts at a time.${over}`;
    }
    byId("guided-sub").textContent = m.method === "ivg" ? "Integrated Value Guidance" : m.method;
  }

  enable(id, on, why) {
    byId(id).disabled = !on;
    byId(id).closest(".field").classList.toggle("off", !on);
    byId(`${id}-help`).textContent = on ? KNOBS.find((k) => k.id === id).help : why;
  }

  // Requests

  /** Body of the request that both sides share. */
  get shared() {
    const number = (id) => Number(byId(id).value);
    return { model: this.model, prompt: byId("prompt").value, temperature: number("temperature"), max_tokens: number("max_tokens"), seed: number("seed") };
  }

  /** The model alone; scored, where a value is at hand, so that the two can be compared. */
  get plain() {
    return { ...this.shared, guidance: { method: "base", ...(this.judge ? { select_value: this.judge } : {}) } };
  }

  /** Guided. `extra`: the judge only looks on. */
  get guided() {
    const m = this.method, guidance = { method: m.method };
    if (this.guides) guidance.beta = Number(byId("beta").value);
    if (this.mix && this.guides) guidance.weights = Object.fromEntries(Object.entries(this.mix).filter(([, w]) => w));
    else if (this.mix) guidance.token_value = "none";
    if (this.selects) {
      if (m.rule !== "reject") for (const id of ["width", "successors"]) guidance[id] = Number(byId(id).value);
      const length = Number(byId("chunk_length").value);
      if (length < WHOLE) guidance.chunk_length = length;
      else if (m.chunk_length !== null) guidance.chunk_length = Number(byId("max_tokens").value);
    } else if (this.judge) guidance.select_value = this.judge;
    return { ...this.shared, guidance };
  }

  /** Is the judge's reading of the guided answer no part of the method? */
  get onlyJudged() {
    const used = this.mix ? Boolean(this.mix[this.judge]) : this.method.token === this.judge;
    return !this.selects && !used;
  }

  /** Whose score the guided answer has. */
  get scorer() {
    return this.method.select ?? (Object.keys(this.method.select_weights ?? {}).join(" + ") || this.judge);
  }

  // The link

  get hash() {
    const link = new URLSearchParams(Object.entries(LINKED).map(([id, letter]) => [letter, byId(id).value]));
    if (this.mix) link.set("x", Object.entries(this.mix).map(([name, w]) => `${name}:${w}`).join(","));
    return `#${link}`;
  }

  /** Put the controls as a link says; what it does not say stays. */
  restore(hash) {
    const link = new URLSearchParams(hash.replace(/^#/, ""));
    const method = link.get("m");
    if (method && this.methods.has(method) && method !== "base") byId("method").value = method;
    if (method) this.toMethod();
    for (const [id, letter] of Object.entries(LINKED)) if (id !== "method" && link.has(letter)) byId(id).value = link.get(letter);
    for (const pair of (link.get("x") ?? "").split(",")) {
      const at = pair.lastIndexOf(":"), input = at > 0 ? byId(`weight-${pair.slice(0, at)}`) : null;
      if (input) input.value = pair.slice(at + 1);
    }
    this.refresh();
    return method && !this.methods.has(method) ? `This server has no method “${method}”; the link’s other settings are in place.` : null;
  }

  /** The control that a field of the request comes from. */
  static control(param) {
    const name = (param ?? "").replace(/^guidance\./, "");
    return byId({ token_value: "method", select_value: "method", weights: "mix", W: "width", K: "successors", L: "chunk_length" }[name] ?? name);
  }

  /** …and what it is called. */
  static label(control) {
    return control.labels?.[0]?.textContent ?? control.querySelector("legend")?.textContent ?? "";
  }
}

/** A method's name and the first words of what it does. */
function named({ method, summary }) {
  const words = summary.split(/[:(,]/)[0].trim();
  return `${method}: ${words.length > 46 ? `${words.slice(0, 45).trimEnd()}…` : words}`;
}

function knob({ id, label, help, min, max, step }) {
  const described = help ? { "aria-describedby": `${id}-help` } : {};
  return make("div", { class: "field" },
    make("div", { class: "head" }, make("label", { for: id }, label), make("output", { id: `${id}-value`, for: id })),
    make("input", { id, type: "range", min, max, step, ...described }),
    ...(help ? [make("p", { id: `${id}-help`, class: "note" }, help)] : []));
}
