// The methods of the server's table: in groups, each with its sentence.

import { make } from "./dom.js";
import { explained } from "./words.js";

/** [title, methods] for each group that has some. */
function groups(methods, levels) {
  return Object.entries(levels)
    .map(([level, title]) => [title, methods.filter((m) => m.level === level)])
    .filter(([, some]) => some.length);
}

/** Options of the menu, in groups. */
export function methodOptions(methods, levels) {
  const option = (m) => make("option", { value: m.method }, `${m.method}: ${shortened(m.summary)}`);
  return groups(methods, levels).map(([title, some]) => make("optgroup", { label: title }, ...some.map(option)));
}

/** All methods in groups with their sentences; `choose(name)` is called for the one that was picked. */
export function methodList(methods, levels, choose) {
  const pick = (name) => {
    const button = make("button", { type: "button", class: "pick" }, name);
    button.addEventListener("click", () => choose(name));
    return button;
  };
  return groups(methods, levels).flatMap(([title, some]) => [
    make("h3", {}, title),
    make("dl", {}, ...some.flatMap((m) => [make("dt", {}, pick(m.method)), make("dd", {}, ...explained(sentence(m.summary)))])),
  ]);
}

/** A summary of the table as a sentence. */
export function sentence(summary) {
  return `${summary[0].toUpperCase()}${summary.slice(1)}.`;
}

function shortened(summary) {
  const words = summary.split(/[:(,]/)[0].trim();
  return words.length > 46 ? `${words.slice(0, 45).trimEnd()}…` : words;
}
