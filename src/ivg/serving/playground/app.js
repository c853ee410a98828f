// The page: start, run, stop, share. run.js asks the server; pane.js and tree.js show the answers.

import { ServerError, models } from "./api.js";
import { byId, formatNumber, make } from "./dom.js";
import { Conversation, showConversation } from "./chat.js";
import { asCurl, asPython, asRecipe } from "./code.js";
import { showGallery, showRecorded } from "./gallery.js";
import { close } from "./popover.js";
import { Runner } from "./run.js";
import { Settings } from "./settings.js";
import { load, startTheme, store } from "./theme.js";

const FILMS = ["The movie was", "I went to see this film with", "The acting in this picture"];
const GENERAL = ["Plan a weekend in Lisbon.", "Explain why the sky is blue.", "Write a polite reply to a late customer."];

const REDRAW_AFTER = 400; // milliseconds after the last move of a slider

const runner = new Runner(), conversation = new Conversation();
let settings = null, redrawing = null;

// Running

async function run({ scroll = true } = {}) {
  if (!settings && !(await start())) return;
  clearTimeout(redrawing);
  showError(null);
  history.replaceState(null, "", settings.hash);
  setRunning(true);
  announce("The answers are being written, the unguided one first.");
  if (scroll) showAnswers();
  const turns = settings.chat ? { base: conversation.base, guided: conversation.guided } : null;
  showConversation(conversation, { done: false });
  const ended = await runner.run({ prompt: byId("prompt").value, ...settings.requests(conversation), turns, key: key() });
  if (!ended) return;
  setRunning(false);
  showConversation(conversation, { done: runner.asked?.complete });
  if (ended.error) showError(ended.error);
  announce(ended.error ? "" : ended.stopped ? "Stopped." : summary());
}

/** A slider of guidance moved: write the answer again, if this server has written one. */
function redraw() {
  clearTimeout(redrawing);
  if (byId("redraw").checked && runner.asked) redrawing = setTimeout(() => runner.asked && run({ scroll: false }), REDRAW_AFTER);
}

/** The answers join the conversation; the next message comes behind them. */
function goOn() {
  if (!runner.asked?.complete) return;
  conversation.add(runner.asked.prompt, runner.base.committed, runner.guided.committed);
  runner.asked = null;
  byId("prompt").value = "";
  onChange();
  showConversation(conversation, { done: false });
  byId("prompt").focus();
}

function startOver() {
  conversation.clear();
  showConversation(conversation, { done: runner.asked?.complete });
  byId("prompt").focus();
}

/** Scroll to the answers where they are below the form. */
function showAnswers() {
  if (byId("answers").getBoundingClientRect().top < byId("form").getBoundingClientRect().bottom) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  byId("answers").scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
}

function setRunning(on) {
  byId("stop").disabled = !on;
  byId("run").textContent = on ? "Run again" : "Run ";
  if (!on) byId("run").append(make("kbd", {}, "Ctrl ⏎"));
}

function summary() {
  const [a, b] = [runner.base.end?.score, runner.guided.end?.score];
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
  if (!box.closest("#form").contains(document.activeElement)) box.scrollIntoView({ block: "nearest" });
  if (error instanceof Error && !(error instanceof ServerError)) console.error(error); // a bug of this page
}

// The key

function key() {
  return byId("key").value.trim();
}

/** Ask for the key, and say what was wrong with the one that was given. */
function askForKey(error) {
  byId("key-form").hidden = false;
  byId("key-error").hidden = !key();
  byId("key-error").textContent = key() ? `This key was refused: ${error.message}.` : "";
  if (key()) byId("key").setAttribute("aria-invalid", "true");
  byId("key").focus();
}

// Start

async function start() {
  try {
    settings = new Settings(await models(key()));
  } catch (error) {
    if (error.status === 401) askForKey(error);
    else showError(error);
    return false;
  }
  showError(null);
  byId("key-form").hidden = true;
  store("ivg.key", key(), "sessionStorage");
  examples();
  byId("conversation").hidden = !settings.chat;
  const missing = settings.restore(location.hash);
  if (missing) showError({ message: missing, param: "method" });
  return true;
}

function examples() {
  const films = settings.server.embedded;
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

/** Copy `text`, and say so on the button; `otherwise` where that is not allowed. */
async function copy(text, button, done, otherwise) {
  const words = await navigator.clipboard?.writeText(text).then(() => done, () => otherwise) ?? otherwise;
  button.dataset.label ??= button.textContent;
  button.textContent = words;
  announce(`${words}.`);
  setTimeout(() => (button.textContent = button.dataset.label), 2000);
}

function share() {
  if (!settings) return;
  history.replaceState(null, "", settings.hash);
  copy(location.href, byId("share"), "Link copied", "Link is in the address bar");
}

/** Show and copy the guided request in the form of the button. */
function showCode({ currentTarget: button }) {
  if (!settings) return;
  const body = settings.plainRequest(conversation), secret = Boolean(key());
  const text = { curl: asCurl, python: asPython }[button.dataset.form]?.(body, secret) ?? asRecipe(body, settings.model, settings.server.embedded, settings.ownValues);
  byId("code").textContent = text;
  byId("code").hidden = false;
  copy(text, button, "Copied", "Not allowed to copy: see below");
}

/** Show a recorded example, and its settings as far as this server has them. */
async function showExample(example) {
  runner.stop();
  showError(null);
  if (settings) {
    const link = new URLSearchParams(example.link.slice(1));
    if (!settings.server.embedded) link.delete("p");
    const missing = settings.restore(`#${link}`);
    history.replaceState(null, "", settings.hash);
    if (missing) showError({ message: missing, param: "method" });
  }
  setRunning(false);
  if (await showRecorded(runner, example.name)) announce(`Recorded example: ${example.title}.`);
  showAnswers();
}

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape" && !close()) runner.stop();
}

function addListeners() {
  showGallery(showExample);
  for (const id of ["beta", "mix", "select-mix"]) byId("form").addEventListener("change", (e) => e.target.closest(`#${id}`) && redraw());
  for (const button of document.querySelectorAll("[data-form]")) button.addEventListener("click", showCode);
  byId("continue").addEventListener("click", goOn);
  byId("restart").addEventListener("click", startOver);
  byId("form").addEventListener("submit", (e) => (e.preventDefault(), run()));
  byId("form").addEventListener("input", onChange);
  byId("method").addEventListener("change", () => (settings?.resetMethod(), onChange()));
  byId("key-form").addEventListener("submit", (e) => (e.preventDefault(), start().then((ok) => ok && byId("prompt").focus())));
  byId("stop").addEventListener("click", () => runner.stop());
  byId("share").addEventListener("click", share);
  byId("defaults").addEventListener("click", () => (settings?.resetAll(), onChange()));
  byId("dice").addEventListener("click", () => {
    byId("seed").value = Math.floor(Math.random() * 100000);
    onChange();
  });
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => settings?.restore(location.hash));
}

startTheme();
byId("key").value = load("ivg.key", "sessionStorage") ?? "";
byId("settings").open = matchMedia("(min-width: 761px)").matches;
addListeners();
if (!location.hash) showRecorded(runner, "ivg");
start();
