// Helpers for the DOM. Text is only inserted as text, never as HTML.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children (elements or text). */
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
export function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A number with a fixed number of decimals and a typographic minus sign. */
export const formatNumber = (x, decimals = 2) => x.toFixed(decimals).replace("-", "−");
export const signed = (x, decimals = 2) => (x > 0 ? "+" : "") + formatNumber(x, decimals);
export const count = (n, word, plural = `${word}s`) => `${n.toLocaleString("en")} ${n === 1 ? word : plural}`;

/** White space made visible. */
export const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +$/g, (s) => "␣".repeat(s.length)) || "(end)";

const canvas = document.createElement("canvas").getContext("2d");

/** The text, or as much of its beginning as fits into `width` pixels with an ellipsis; letters differ in width, so it is measured. */
export function shorten(text, width, font) {
  canvas.font = font;
  const fits = (t) => canvas.measureText(t).width <= width - 1;
  if (fits(text)) return text;
  const letters = [...text];
  const cut = (n) => `${letters.slice(0, n).join("").trimEnd()}…`;
  let kept = 0, over = 1; // `kept` letters fit, `over` do not: from the front, as the text may be a whole answer
  while (over < letters.length && fits(cut(over))) [kept, over] = [over, over * 2];
  over = Math.min(over, letters.length);
  while (over - kept > 1) {
    const middle = (kept + over) >> 1;
    if (fits(cut(middle))) kept = middle;
    else over = middle;
  }
  return cut(kept);
}

/** Roving tabindex: arrow keys move the focus among `items()`; `step(key, from, items)` gives the next index or null. */
export function roving(container, items, step) {
  container.addEventListener("keydown", (e) => {
    const all = items(), at = all.indexOf(document.activeElement);
    if (at < 0) return;
    const to = step(e.key, at, all);
    if (to === null || !all[to]) return;
    e.preventDefault();
    all[at].setAttribute("tabindex", "-1");
    all[to].setAttribute("tabindex", "0");
    all[to].focus();
  });
}

/** `step` for a line of items. */
export function along(key, at, all) {
  return { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[key] ?? null;
}
