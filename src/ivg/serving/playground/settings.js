// The settings: controls, their defaults for each method, the link that stores them, and the request bodies.

import { byId, make } from "./dom.js";

const CONTROLS = [
  { id: "beta", letter: "b", label: "Guidance strength β", help: "0: no guidance; larger values guide more strongly.", min: 0, max: 4, step: 0.1 },
  { id: "width", letter: "w", label: "Drafts kept W", help: "Number of drafts kept after each chunk.", min: 1, max: 16, step: 1 },
  { id: "successors", letter: "k", label: "Continuations per draft K", help: "Number of continuations sampled from each kept draft.", min: 1, max: 16, step: 1 },
  { id: "chunk_length", letter: "l", label: "Chunk length L", help: "Tokens between two selections.", min: 1, max: 51, step: 1 },
  { id: "temperature", letter: "t", label: "Temperature", help: "0 is greedy; higher values are more random.", min: 0, max: 2, step: 0.05 },
  { id: "max_tokens", letter: "n", label: "Maximum length", help: "In tokens, about ¾ of a word each.", min: 1, max: 200, step: 1 },
];
const WHOLE = 51;
const SEARCH = ["beta", "width", "successors", "chunk_length"];
const INSTRUCTIONS = ["contrast", "negative"];
const LINKED = { prompt: "p", method: "m", seed: "s", contrast: "i", negative: "o", ...Object.fromEntries(CONTROLS.map((k) => [k.id, k.letter])) };

/** All controls of the form. */
export class Settings {
  /** @param {object} listing the response of v1/models */
  constructor(listing) {
    this.model = listing.data[0].id;
    this.methods = new Map(listing.data.slice(1).map((entry) => [entry.ivg.method, entry.ivg]));
    const fallback = listing.data[0].ivg;
    if (!this.methods.has(fallback.method)) this.methods.set(fallback.method, fallback);
    this.methods.set(fallback.method, fallback);
    this.start = fallback.method;
    ({ limits: this.limits, values: this.values, defaults: this.defaults } = { limits: {}, values: [], defaults: {}, ...listing.ivg });
    this.build();
    this.resetAll();
  }

  get scorer() {
    return ["explicit", "reward"].find((name) => this.values.includes(name)) ?? null;
  }

  get method() {
    return this.methods.get(byId("method").value);
  }

  build() {
    const known = [...this.methods.values()].filter((m) => m.method !== "base");
    byId("method").replaceChildren(...known.map((m) => make("option", { value: m.method }, methodLabel(m))));
    byId("method").value = this.start === "base" ? known[0]?.method : this.start;
    byId("sliders").replaceChildren(...CONTROLS.map((k) => slider({ ...k, max: this.most(k) })));
    byId("weights").replaceChildren(...this.values.map((name) => slider({ id: `weight-${name}`, label: name, min: -2, max: 2, step: 0.1 })));
    byId("mix").hidden = this.values.length < 2;
  }

  most({ id, max }) {
    if (id === "max_tokens") return Math.min(max, this.limits.max_tokens ?? max);
    return max;
  }

  /** Reset all settings to the defaults of the method and of the server. */
  resetAll() {
    byId("temperature").value = this.defaults.temperature ?? 1;
    byId("max_tokens").value = this.defaults.max_new_tokens ?? 50;
    this.resetMethod();
  }

  /** Reset the settings of the search to the defaults of the method. */
  resetMethod() {
    const m = this.method;
    for (const id of SEARCH) byId(id).value = m[id] ?? WHOLE;
    for (const name of this.values) byId(`weight-${name}`).value = this.ownWeight(name);
    for (const id of INSTRUCTIONS) byId(id).value = m[id] ?? byId(id).value;
    this.refresh();
  }

  ownWeight(name) {
    const { token, weights } = this.method;
    if (weights && Object.keys(weights).length) return weights[name] ?? 0;
    return token === name ? 1 : 0;
  }

  /** Weights of the token guides if they differ from the method's; null otherwise. */
  get customWeights() {
    const mix = Object.fromEntries(this.values.map((name) => [name, Number(byId(`weight-${name}`).value)]));
    return this.values.some((name) => mix[name] !== this.ownWeight(name)) ? mix : null;
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
    byId("method-help").textContent = `${m.summary[0].toUpperCase()}${m.summary.slice(1)}.`;
    for (const input of document.querySelectorAll("#settings input[type=range]")) {
      const whole = input.id === "chunk_length" && Number(input.value) >= WHOLE;
      const text = whole ? "whole answer" : String(Number(input.value)).replace("-", "−");
      byId(`${input.id}-value`).textContent = text;
      input.setAttribute("aria-valuetext", text);
    }
    this.enable("beta", this.hasGuidance, "This method has no token guidance.");
    for (const id of ["width", "successors"]) this.enable(id, this.hasSelection && !alone, "This method has no value to select drafts; it writes one draft.");
    this.enable("chunk_length", this.hasSelection, "This method has no selection.");
    const drafts = value("width") * value("successors"), most = this.limits.max_hypotheses ?? Infinity;
    if (this.hasSelection && !alone) {
      const over = drafts > most ? ` This server allows ${most}.` : "";
      byId("successors-help").textContent = `W · K = ${drafts} drafts at a time.${over}`;
    }
    byId("instruction").hidden = !this.hasInstruction;
    byId("guided-sub").textContent = m.method === "ivg" ? "Integrated Value Guidance" : m.method;
  }

  enable(id, on, why) {
    byId(id).disabled = !on;
    byId(id).closest(".field").classList.toggle("off", !on);
    byId(`${id}-help`).textContent = on ? CONTROLS.find((k) => k.id === id).help : why;
  }

  // Requests

  /** Fields of both requests. */
  get shared() {
    const number = (id) => Number(byId(id).value);
    return { model: this.model, prompt: byId("prompt").value, temperature: number("temperature"), max_tokens: number("max_tokens"), seed: number("seed") };
  }

  /** The model alone; scored if there is a value, so that the two can be compared. */
  get unguided() {
    return { ...this.shared, guidance: { method: "base", ...(this.scorer ? { select_value: this.scorer } : {}) } };
  }

  /** The guided request. */
  get guided() {
    const m = this.method, guidance = { method: m.method };
    if (this.hasInstruction) for (const id of INSTRUCTIONS) if (byId(id).value.trim()) guidance[id] = byId(id).value;
    if (this.hasGuidance) guidance.beta = Number(byId("beta").value);
    if (this.customWeights && this.hasGuidance) guidance.weights = Object.fromEntries(Object.entries(this.customWeights).filter(([, w]) => w));
    else if (this.customWeights) guidance.token_value = "none";
    if (this.hasSelection) {
      if (m.rule !== "reject") for (const id of ["width", "successors"]) guidance[id] = Number(byId(id).value);
      const length = Number(byId("chunk_length").value);
      if (length < WHOLE) guidance.chunk_length = length;
      else if (m.chunk_length !== null) guidance.chunk_length = Number(byId("max_tokens").value);
    } else if (this.scorer) guidance.select_value = this.scorer;
    return { ...this.shared, guidance };
  }

  /** Does the scoring value only score the guided answer, without being part of the method? */
  get scoredOnly() {
    const used = this.customWeights ? Boolean(this.customWeights[this.scorer]) : this.method.token === this.scorer;
    return !this.hasSelection && !used;
  }

  /** Name of the value whose score the guided answer has. */
  get guidedScorer() {
    return this.method.select ?? (Object.keys(this.method.select_weights ?? {}).join(" + ") || this.scorer);
  }

  // The link

  get hash() {
    const link = new URLSearchParams(Object.entries(LINKED).map(([id, letter]) => [letter, byId(id).value]));
    if (this.customWeights) link.set("x", Object.entries(this.customWeights).map(([name, w]) => `${name}:${w}`).join(","));
    return `#${link}`;
  }

  /** Set the controls from a link; settings that it lacks stay. */
  restore(hash) {
    const link = new URLSearchParams(hash.replace(/^#/, ""));
    const method = link.get("m");
    if (method && this.methods.has(method) && method !== "base") byId("method").value = method;
    if (method) this.resetMethod();
    for (const [id, letter] of Object.entries(LINKED)) if (id !== "method" && link.has(letter)) byId(id).value = link.get(letter);
    for (const pair of (link.get("x") ?? "").split(",")) {
      const at = pair.lastIndexOf(":"), input = at > 0 ? byId(`weight-${pair.slice(0, at)}`) : null;
      if (input) input.value = pair.slice(at + 1);
    }
    this.refresh();
    return method && !this.methods.has(method) ? `This server has no method “${method}”; the other settings of the link were applied.` : null;
  }

  /** The control for a field of the request body. */
  static control(param) {
    const name = (param ?? "").replace(/^guidance\./, "");
    return byId({ token_value: "method", select_value: "method", weights: "mix", W: "width", K: "successors", L: "chunk_length" }[name] ?? name);
  }

  /** The label of a control. */
  static label(control) {
    return control.labels?.[0]?.textContent ?? control.querySelector("legend")?.textContent ?? "";
  }
}

/** Name and short description of a method. */
function methodLabel({ method, summary }) {
  const words = summary.split(/[:(,]/)[0].trim();
  return `${method}: ${words.length > 46 ? `${words.slice(0, 45).trimEnd()}…` : words}`;
}

function slider({ id, label, help, min, max, step }) {
  const described = help ? { "aria-describedby": `${id}-help` } : {};
  return make("div", { class: "field" },
    make("div", { class: "head" }, make("label", { for: id }, label), make("output", { id: `${id}-value`, for: id })),
    make("input", { id, type: "range", min, max, step, ...described }),
    ...(help ? [make("p", { id: `${id}-help`, class: "note" }, help)] : []));
}
