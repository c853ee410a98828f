// The popover: alternatives of a token, or the text of a beam. Opens by pointer, focus or tap; Escape closes it.

import { byId, formatNumber, make, visible, signed } from "./dom.js";

const pop = byId("pop");
let owner = null;

/** `element` opens the popover; `content()` gives its children, or null for none. */
export function attachPopover(element, content) {
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

/** Close the popover if `element` (default: any element) has it open; returns whether it was open. */
export function close(element = owner) {
  if (!owner || element !== owner) return false;
  owner.classList.remove("open");
  owner.removeAttribute("aria-describedby");
  owner = null;
  pop.hidden = true;
  return true;
}

/** How far guidance changed the probability of a token, in words. */
export function describeShift(shift) {
  if (Math.abs(shift) < 0.05) return "Guidance did not change its probability.";
  const factor = Math.exp(Math.abs(shift));
  const times = factor >= 1000 ? "more than 1000 times" : `${formatNumber(factor, factor < 10 ? 1 : 0)} times`;
  return `Guidance made it ${times} ${shift > 0 ? "likelier" : "less likely"}.`;
}

/** Content for a token: its shift, and its alternatives before and after guidance. */
export function tokenContent(token) {
  const head = [make("h3", {}, `“${visible(token.text)}”`), make("div", {}, `${describeShift(token.shift)} (${signed(token.shift)} nats; 0.69 nats are a factor of 2)`)];
  if (!token.top) return head;
  return [...head, alternativesTable(alternatives(token), token)];
}

/**
 * The likeliest tokens of both distributions and the drawn one, with their probabilities before and after guidance; null where a
 * distribution does not list the token.
 */
export function alternatives(token) {
  const rows = new Map();
  const add = (list, side) => list.forEach(({ text, logprob }) => {
    if (!rows.has(text)) rows.set(text, { text, before: null, after: null });
    rows.get(text)[side] = Math.exp(logprob);
  });
  add([{ text: token.text, logprob: token.logprob }, ...token.top.slice(0, 5)], "after");
  add([{ text: token.text, logprob: token.base_logprob }, ...token.top_base.slice(0, 5)], "before");
  return [...rows.values()].sort((a, b) => (b.after ?? 0) - (a.after ?? 0) || (b.before ?? 0) - (a.before ?? 0));
}

function alternativesTable(rows, token) {
  const drawn = token.text, least = (list) => Math.exp(Math.min(...list.map((t) => t.logprob)));
  const head = make("tr", {}, make("th", { scope: "col" }, "token"), make("th", { scope: "col" }, "model alone"), make("th", { scope: "col" }, "guided"));
  const body = rows.map((r) =>
    make("tr", r.text === drawn ? { class: "drawn" } : {},
      make("td", {}, visible(r.text), ...(r.text === drawn ? [make("span", { class: "visually-hidden" }, " (was drawn)")] : [])),
      make("td", {}, meter(r.before, "before", least(token.top_base))), make("td", {}, meter(r.after, "after", least(token.top)))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

function meter(p, side, least) {
  const bar = make("i", { "aria-hidden": "true" });
  bar.style.width = `${Math.round(52 * (p ?? 0))}px`;
  return make("span", { class: `meter ${side}` }, bar, p === null ? `<${percent(Math.max(least, 0.01))}` : p < 0.005 ? "<1 %" : percent(p));
}

const percent = (p) => `${Math.round(100 * p)} %`;

/** Content for a beam of the tree. */
export function beamContent(node) {
  const status = node.won ? "Became the answer." : node.kept ? "Kept." : "Dropped.";
  const end = { stop: " The text ended here.", length: " Maximum length reached." }[node.finish] ?? "";
  const score = node.score === null ? "" : ` Score ${formatNumber(node.score)}.`;
  return [make("h3", {}, `Chunk ${node.column + 1}`), make("div", {}, status + score + end), make("div", { class: "text" }, node.chunk || "(no text)")];
}
