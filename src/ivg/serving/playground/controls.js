// The sliders: names, ranges, help texts.

import { make } from "./dom.js";

export const CONTROLS = [
  { id: "beta", letter: "b", label: "Guidance strength β", help: "0: no guidance; larger values guide more strongly.", min: 0, max: 4, step: 0.1 },
  { id: "width", letter: "w", label: "Beams kept W", help: "Number of beams kept after each chunk.", min: 1, max: 16, step: 1 },
  { id: "successors", letter: "k", label: "Continuations per beam K", help: "Number of continuations sampled from each kept beam.", min: 1, max: 16, step: 1 },
  { id: "chunk_length", letter: "l", label: "Chunk length L", help: "Tokens between two selections.", min: 1, max: 51, step: 1 },
  { id: "temperature", letter: "t", label: "Temperature", help: "0 is greedy; higher values are more random.", min: 0, max: 2, step: 0.05 },
  { id: "max_tokens", letter: "n", label: "Length", help: "In tokens, about ¾ of a word each.", min: 1, max: 200, step: 1 },
];

/** Position of the slider of the chunk length that means: the whole answer. */
export const WHOLE = 51;

/** A slider with its label, its number and a help text. */
export function slider({ id, label, help, min, max, step }) {
  const described = help ? { "aria-describedby": `${id}-help` } : {};
  return make("div", { class: "field" },
    make("div", { class: "head" }, make("label", { for: id }, label), make("output", { id: `${id}-value`, for: id })),
    make("input", { id, type: "range", min, max, step, ...described }),
    ...(help ? [make("p", { id: `${id}-help`, class: "note" }, help)] : []));
}
