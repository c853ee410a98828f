// The page: start, run, stop, share, theme. api.js talks to the server; pane.js and tree.js show the answers.

import { Pane } from "./pane.js";
import { byId, formatNumber, make } from "./dom.js";
import { close } from "./popover.js";
import { Settings } from "./settings.js";
import { Tree } from "./tree.js";
import { ServerError, complete, models } from "./api.js";

const FILMS = ["The movie was", "I went to see this film with", "The acting in this picture"];
const GENERAL = ["Plan a weekend in Lisbon.", "Explain why the sky is blue.", "Write a polite reply to a late customer."];
const THEMES = ["auto", "light", "dark"];

const base = new Pane(byId("base")), guided = new Pane(byId("guided"));
const tree = new Tree({ scroll: byId("tree-scroll"), summaryText: byId("tree-summary"), legend: byId("tree-legend") });
let settings = null;
let running = null;

// Running

async function run() {
  if (!settings && !(await start())) return;
  stop();
  showError(null);
  const control = new AbortController();
  running = control;
  setRunning(true);
  history.replaceState(null, "", settings.hash);
  const prompt = byId("prompt").value, unguidedBody = settings.unguided, guidedBody = settings.guided;
  const scoring = { scorer: settings.scorer, guidedScorer: settings.guidedScorer, scoredOnly: settings.scoredOnly };
  tree.clear();
  byId("tree-summary").textContent = "Waiting for the first chunk.";
  announce("Both answers are being generated.");
  const work = [generate(base, unguidedBody, prompt, control, null), generate(guided, guidedBody, prompt, control, tree)];
  const ends = await Promise.all(work);
  if (running !== control) return;
  running = null;
  setRunning(false);
  if (!tree.nodes.length) byId("tree-summary").textContent = "No chunk was completed.";
  const errors = ends.filter(Boolean);
  showCosts(scoring, control.signal.aborted ? "stopped by you" : errors.length ? "by an error, see the message" : null);
  if (errors.length) showError(errors[0]);
  announce(errors.length ? "" : control.signal.aborted ? "Stopped." : summary());
}

/** Generate one answer; returns an error or null. */
async function generate(pane, body, prompt, control, tree) {
  pane.begin(prompt);
  try {
    for await (const event of complete(body, { key: key(), signal: control.signal })) {
      if (control.signal.aborted) break;
      pane.update(event);
      if (event.type === "beams") tree?.update(event.data);
    }
    if (!control.signal.aborted) tree?.finish(pane.committed);
  } catch (error) {
    if (!control.signal.aborted) return error;
  } finally {
    if (running === control) pane.finish(); // else another run has started in this pane
  }
  return null;
}

function stop() {
  running?.abort();
}

function setRunning(on) {
  byId("stop").disabled = !on;
  byId("run").textContent = on ? "Run again" : "Run ";
  if (!on) byId("run").append(make("kbd", {}, "Ctrl ⏎"));
}

/** Show the cost of both answers relative to plain sampling; a value that only scores an answer is not counted. */
function showCosts(scoring, note) {
  const total = (end, without) => Object.entries(end?.usage ?? {}).filter(([name]) => name !== without);
  const sum = (parts) => parts.reduce((n, [, tokens]) => n + tokens, 0);
  const left = total(base.end, scoring.scorer), right = total(guided.end, scoring.scoredOnly ? scoring.scorer : null);
  const plain = sum(left), most = Math.max(plain, sum(right), 1);
  const cost = (pane, parts, scorer) => pane.end?.usage ? {
    score: pane.end.score, scorer, read: sum(parts), ratio: plain ? sum(parts) / plain : null, share: sum(parts) / most, usage: Object.fromEntries(parts),
  } : null;
  base.showCost(cost(base, left, scoring.scorer), base.end ? null : note);
  guided.showCost(cost(guided, right, scoring.guidedScorer), guided.end ? null : note);
}

function summary() {
  const [a, b] = [base.end?.score, guided.end?.score];
  const scores = typeof a === "number" && typeof b === "number" ? ` Scores: unguided ${formatNumber(a)}, guided ${formatNumber(b)}.` : "";
  return `Both answers are done.${scores}`;
}

// Messages

function announce(text) {
  byId("status").textContent = text;
}

/** Show an error at the top of the form, and mark its field. */
function showError(error) {
  for (const marked of document.querySelectorAll("[aria-invalid]")) marked.removeAttribute("aria-invalid");
  const box = byId("error");
  box.hidden = !error;
  box.replaceChildren();
  if (!error) return;
  const control = error.param ? Settings.control(error.param) : null;
  const field = control ? `Setting: ${Settings.label(control)}` : error.param ? `Field: ${error.param}` : "";
  const wait = error.retry ? ` Try again in ${error.retry} s.` : "";
  box.append(make("b", {}, error.status ? "The server refused the request." : "Something went wrong."), make("span", {}, error.message, wait), make("em", {}, field));
  control?.setAttribute("aria-invalid", "true");
  if (error.status === 401) byId("key-box").hidden = false;
  if (error.status === 401) byId("key").focus();
  if (error instanceof Error && !(error instanceof ServerError)) console.error(error); // a bug of this page
}

// Start

function key() {
  return byId("key").value.trim();
}

async function start() {
  try {
    settings = new Settings(await models(key()));
  } catch (error) {
    showError(error);
    return false;
  }
  showError(null);
  store("ivg.key", key(), sessionStorage);
  examples();
  const missing = settings.restore(location.hash);
  if (missing) showError({ message: missing, param: "method" });
  return true;
}

function examples() {
  const films = settings.model === "embedded";
  byId("about").textContent = films
    ? "The embedded models: a small language model trained on film reviews, and values that prefer positive reviews."
    : `The model is ${settings.model}.`;
  const pick = (text) => {
    const button = make("button", { type: "button" }, text);
    button.addEventListener("click", () => {
      byId("prompt").value = text;
      onChange();
      run();
    });
    return button;
  };
  byId("examples").replaceChildren(...(films ? FILMS : GENERAL).map(pick));
  if (!films && byId("prompt").value === FILMS[0]) byId("prompt").value = GENERAL[0];
}

function onChange() {
  settings?.refresh();
  if (settings) history.replaceState(null, "", settings.hash);
}

async function share() {
  if (!settings) return;
  history.replaceState(null, "", settings.hash);
  let copied = true;
  try {
    await navigator.clipboard.writeText(location.href);
  } catch {
    copied = false; // not allowed, or not a secure context
  }
  const words = copied ? "Link copied" : "Link is in the address bar";
  byId("share").textContent = words;
  announce(`${words}.`);
  setTimeout(() => (byId("share").textContent = "Copy link"), 2000);
}

function store(name, value, where = localStorage) {
  try {
    where.setItem(name, value);
  } catch {
    // storage is disabled
  }
}

function load(name, where = localStorage) {
  try {
    return where.getItem(name);
  } catch {
    return null;
  }
}

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  byId("theme").textContent = `Theme: ${{ auto: "system", light: "light", dark: "dark" }[name]}`;
  byId("theme").dataset.now = name;
}

function nextTheme() {
  const name = THEMES[(THEMES.indexOf(byId("theme").dataset.now) + 1) % THEMES.length];
  setTheme(name);
  store("ivg.theme", name);
}

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape" && !close()) stop();
}

function addListeners() {
  byId("form").addEventListener("submit", (e) => (e.preventDefault(), run()));
  byId("form").addEventListener("input", (e) => e.target.id !== "key" && onChange());
  byId("method").addEventListener("change", () => (settings?.resetMethod(), onChange()));
  byId("key").addEventListener("change", () => start());
  byId("stop").addEventListener("click", stop);
  byId("share").addEventListener("click", share);
  byId("theme").addEventListener("click", nextTheme);
  byId("defaults").addEventListener("click", () => (settings?.resetAll(), onChange()));
  byId("dice").addEventListener("click", () => {
    byId("seed").value = Math.floor(Math.random() * 100000);
    onChange();
  });
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => settings?.restore(location.hash));
}

setTheme(THEMES.includes(load("ivg.theme")) ? load("ivg.theme") : "auto");
byId("key").value = load("ivg.key", sessionStorage) ?? "";
byId("settings").open = matchMedia("(min-width: 761px)").matches;
addListeners();
start();
