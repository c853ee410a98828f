// The one popover: what guidance did to a token, or what a draft of the tree says. Opens by pointer, focus or tap; Escape closes it.

import { byId, figure, make, shown, signed } from "./dom.js";

const pop = byId("pop");
let owner = null;

/** `element` opens the popover; `content()` gives its children, or null for none. */
export function explains(element, content) {
  const show = () => open(element, content);
  element.addEventListener("pointerenter", (e) => e.pointerType === "mouse" && show());
  element.addEventListener("pointerleave", (e) => e.pointerType === "mouse" && document.activeElement !== element && close(element));
  element.addEventListener("focus", show);
  element.addEventListener("blur", () => close(element));
  element.addEventListener("click", () => (element.focus(), show()));
  element.addEventListener("keydown", (e) => {
    if ((e.key !== "Enter" && e.key !== " ") || e.ctrlKey || e.metaKey) return;
    e.preventDefault();
    show();
  });
}

function open(element, content) {
  const children = content();
  if (!children) return;
  close();
  owner = element;
  element.classList.add("open");
  element.setAttribute("aria-describedby", "pop");
  pop.replaceChildren(...children);
  pop.hidden = false;
  const at = element.getClientRects()[0] ?? element.getBoundingClientRect(), size = pop.getBoundingClientRect();
  const wide = document.documentElement.clientWidth;
  const below = at.bottom + 8 + size.height <= window.innerHeight || at.top < size.height + 8;
  pop.style.left = `${window.scrollX + Math.max(8, Math.min(at.left, wide - size.width - 8))}px`;
  pop.style.top = `${window.scrollY + (below ? at.bottom + 8 : at.top - size.height - 8)}px`;
}

/** Close it, if `element` (or anything) has it open; was there anything to close? */
export function close(element = owner) {
  if (!owner || element !== owner) return false;
  owner.classList.remove("open");
  owner.removeAttribute("aria-describedby");
  owner = null;
  pop.hidden = true;
  return true;
}

/** In words: how far guidance moved a token. */
export function moved(shift) {
  if (Math.abs(shift) < 0.05) return "Guidance left its chance as it was.";
  const factor = Math.exp(Math.abs(shift));
  const times = factor >= 1000 ? "more than 1000 times" : `${figure(factor, factor < 10 ? 1 : 0)} times`;
  return `Guidance made it ${times} ${shift > 0 ? "likelier" : "less likely"}.`;
}

/** For a token: words, and its rivals before and after guidance as bars. */
export function aboutToken(token) {
  const head = [make("h3", {}, `“${shown(token.text)}”`), make("div", {}, `${moved(token.shift)} (${signed(token.shift)} nats)`)];
  if (!token.top) return head;
  return [...head, bars(rivals(token), token)];
}

/**
 * The likeliest tokens of both distributions and the drawn one: text, probability before and after. Where a side does not list a
 * token, it is null: less than the least that is listed.
 */
export function rivals(token) {
  const rows = new Map();
  const add = (list, side) => list.forEach(({ text, logprob }) => {
    if (!rows.has(text)) rows.set(text, { text, before: null, after: null });
    rows.get(text)[side] = Math.exp(logprob);
  });
  add([{ text: token.text, logprob: token.logprob }, ...token.top.slice(0, 5)], "after");
  add([{ text: token.text, logprob: token.base_logprob }, ...token.top_base.slice(0, 5)], "before");
  return [...rows.values()].sort((a, b) => (b.after ?? 0) - (a.after ?? 0) || (b.before ?? 0) - (a.before ?? 0));
}

function bars(rows, token) {
  const drawn = token.text, least = (list) => Math.exp(Math.min(...list.map((t) => t.logprob)));
  const head = make("tr", {}, make("th", { scope: "col" }, "could be"), make("th", { scope: "col" }, "model alone"), make("th", { scope: "col" }, "guided"));
  const body = rows.map((r) =>
    make("tr", r.text === drawn ? { class: "drawn" } : {},
      make("td", {}, shown(r.text), ...(r.text === drawn ? [make("span", { class: "visually-hidden" }, " (was drawn)")] : [])),
      make("td", {}, meter(r.before, "before", least(token.top_base))), make("td", {}, meter(r.after, "after", least(token.top)))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

function meter(p, side, least) {
  const bar = make("i", { "aria-hidden": "true" });
  bar.style.width = `${Math.round(52 * (p ?? 0))}px`;
  return make("span", { class: `meter ${side}` }, bar, p === null ? `<${percent(Math.max(least, 0.01))}` : p < 0.005 ? "<1 %" : percent(p));
}

const percent = (p) => `${Math.round(100 * p)} %`;

/** For a draft of the tree. */
export function aboutDraft(node) {
  const fate = node.won ? "Became the answer." : node.kept ? "Kept." : "Dropped.";
  const end = { stop: " It ended here.", length: " It reached the longest length." }[node.finish] ?? "";
  const score = node.score === null ? "" : ` Score ${figure(node.score)}.`;
  return [make("h3", {}, `Chunk ${node.column + 1}`), make("div", {}, fate + score + end), make("div", { class: "text" }, node.chunk || "(nothing more)")];
}
