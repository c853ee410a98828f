// The page: start, run, stop, share, light and dark. What is said to whom is in wire.js; what is shown where in answer.js and tree.js.

import { Answer } from "./answer.js";
import { byId, figure, make } from "./dom.js";
import { close } from "./pop.js";
import { Settings } from "./settings.js";
import { Tree } from "./tree.js";
import { ServerError, complete, models } from "./wire.js";

const FILMS = ["The movie was", "I went to see this film with", "The acting in this picture"];
const GENERAL = ["Plan a weekend in Lisbon.", "Explain why the sky is blue.", "Write a polite reply to a late customer."];
const THEMES = ["auto", "light", "dark"];

const base = new Answer(byId("base")), guided = new Answer(byId("guided"));
const tree = new Tree({ scroll: byId("tree-scroll"), words: byId("tree-words"), legend: byId("tree-legend") });
let settings = null;
let running = null;

// Running

async function run() {
  if (!settings && !(await start())) return;
  stop();
  fault(null);
  const control = new AbortController();
  running = control;
  busy(true);
  history.replaceState(null, "", settings.hash);
  const prompt = byId("prompt").value, plainBody = settings.plain, guidedBody = settings.guided;
  const terms = { judge: settings.judge, scorer: settings.scorer, onlyJudged: settings.onlyJudged };
  tree.clear();
  byId("tree-words").textContent = "Waiting for the first chunk.";
  say("Both answers are being written.");
  const work = [answer(base, plainBody, prompt, control, null), answer(guided, guidedBody, prompt, control, tree)];
  const ends = await Promise.all(work);
  if (running !== control) return;
  running = null;
  busy(false);
  if (!tree.nodes.length) byId("tree-words").textContent = "No chunk was completed.";
  const errors = ends.filter(Boolean);
  account(terms, control.signal.aborted ? "stopped by you" : errors.length ? "by an error, see the message" : null);
  if (errors.length) fault(errors[0]);
  say(errors.length ? "" : control.signal.aborted ? "Stopped." : verdict());
}

/** Write one answer; what went wrong, or null. */
async function answer(pane, body, prompt, control, board) {
  pane.begin(prompt);
  try {
    for await (const event of complete(body, { key: key(), signal: control.signal })) {
      if (control.signal.aborted) break;
      pane.take(event);
      if (event.type === "beams") board?.take(event.data);
    }
    if (!control.signal.aborted) board?.finish(pane.committed);
  } catch (error) {
    if (!control.signal.aborted) return error;
  } finally {
    if (running === control) pane.finish(); // else the next run has begun in this pane
  }
  return null;
}

function stop() {
  running?.abort();
}

function busy(on) {
  byId("stop").disabled = !on;
  byId("run").textContent = on ? "Run again" : "Run ";
  if (!on) byId("run").append(make("kbd", {}, "Ctrl ⏎"));
}

/** Costs of both sides, next to what plain sampling read: the base's own tokens, without the judge who only looked on. */
function account(terms, note) {
  const total = (end, without) => Object.entries(end?.usage ?? {}).filter(([name]) => name !== without);
  const sum = (parts) => parts.reduce((n, [, tokens]) => n + tokens, 0);
  const left = total(base.end, terms.judge), right = total(guided.end, terms.onlyJudged ? terms.judge : null);
  const plain = sum(left), most = Math.max(plain, sum(right), 1);
  const cost = (pane, parts, judge) => pane.end?.usage ? {
    score: pane.end.score, judge, read: sum(parts), ratio: plain ? sum(parts) / plain : null, share: sum(parts) / most, usage: Object.fromEntries(parts),
  } : null;
  base.account(cost(base, left, terms.judge), base.end ? null : note);
  guided.account(cost(guided, right, terms.scorer), guided.end ? null : note);
}

function verdict() {
  const [a, b] = [base.end?.score, guided.end?.score];
  const scores = typeof a === "number" && typeof b === "number" ? ` Scores: unguided ${figure(a)}, guided ${figure(b)}.` : "";
  return `Both answers are done.${scores}`;
}

// Words for people

function say(words) {
  byId("status").textContent = words;
}

/** Show an error as words at the top of the form, and mark the field that it is about. */
function fault(error) {
  for (const marked of document.querySelectorAll("[aria-invalid]")) marked.removeAttribute("aria-invalid");
  const box = byId("error");
  box.hidden = !error;
  box.replaceChildren();
  if (!error) return;
  const control = error.param ? Settings.control(error.param) : null;
  const field = control ? `Setting: ${Settings.label(control)}` : error.param ? `Field: ${error.param}` : "";
  const wait = error.retry ? ` Try again in ${error.retry} s.` : "";
  box.append(make("b", {}, error.status ? "The server did not accept this." : "Something went wrong."), make("span", {}, error.message, wait), make("em", {}, field));
  control?.setAttribute("aria-invalid", "true");
  if (error.status === 401) byId("key-box").hidden = false;
  if (error.status === 401) byId("key").focus();
  if (error instanceof Error && !(error instanceof ServerError)) console.error(error); // a mistake of this page
}

// Start

function key() {
  return byId("key").value.trim();
}

async function start() {
  try {
    settings = new Settings(await models(key()));
  } catch (error) {
    fault(error);
    return false;
  }
  fault(null);
  remember("ivg.key", key(), sessionStorage);
  examples();
  const missing = settings.restore(location.hash);
  if (missing) fault({ message: missing, param: "method" });
  return true;
}

function examples() {
  const films = settings.model === "embedded";
  byId("about").textContent = films
    ? "These are the models that come with ivg: a small writer that has read film reviews only, and guides that like good reviews."
    : `The model is ${settings.model}.`;
  const pick = (text) => {
    const button = make("button", { type: "button" }, text);
    button.addEventListener("click", () => {
      byId("prompt").value = text;
      changed();
      run();
    });
    return button;
  };
  byId("examples").replaceChildren(...(films ? FILMS : GENERAL).map(pick));
  if (!films && byId("prompt").value === FILMS[0]) byId("prompt").value = GENERAL[0];
}

function changed() {
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
    copied = false; // not allowed, or no secure page: the address bar has the link
  }
  const words = copied ? "Link copied" : "Link is in the address bar";
  byId("share").textContent = words;
  say(`${words}.`);
  setTimeout(() => (byId("share").textContent = "Copy link"), 2000);
}

function remember(name, value, where = localStorage) {
  try {
    where.setItem(name, value);
  } catch {
    // a browser that keeps nothing
  }
}

function recall(name, where = localStorage) {
  try {
    return where.getItem(name);
  } catch {
    return null;
  }
}

function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  byId("theme").textContent = `Theme: ${{ auto: "as the system", light: "light", dark: "dark" }[name]}`;
  byId("theme").dataset.now = name;
}

function nextTheme() {
  const name = THEMES[(THEMES.indexOf(byId("theme").dataset.now) + 1) % THEMES.length];
  theme(name);
  remember("ivg.theme", name);
}

function keys(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape" && !close()) stop();
}

function wire() {
  byId("form").addEventListener("submit", (e) => (e.preventDefault(), run()));
  byId("form").addEventListener("input", (e) => e.target.id !== "key" && changed());
  byId("method").addEventListener("change", () => (settings?.toMethod(), changed()));
  byId("key").addEventListener("change", () => start());
  byId("stop").addEventListener("click", stop);
  byId("share").addEventListener("click", share);
  byId("theme").addEventListener("click", nextTheme);
  byId("defaults").addEventListener("click", () => (settings?.toDefaults(), changed()));
  byId("dice").addEventListener("click", () => {
    byId("seed").value = Math.floor(Math.random() * 100000);
    changed();
  });
  document.addEventListener("keydown", keys);
  addEventListener("hashchange", () => settings?.restore(location.hash));
}

theme(THEMES.includes(recall("ivg.theme")) ? recall("ivg.theme") : "auto");
byId("key").value = recall("ivg.key", sessionStorage) ?? "";
byId("settings").open = matchMedia("(min-width: 761px)").matches;
wire();
start();
