// The examples of the documentation: three of docs/tutorials/first-steps.md, one of docs/how-to/one-network.md. And their recorded runs.

import { byId, make } from "./dom.js";

export const EXAMPLES = [
  {
    name: "eft",
    title: "Guide every token",
    words: "A small model before and after its tuning makes praise likelier, token by token (emulated fine-tuning).",
    link: "#m=eft&p=The+movie+was&b=1&t=0.7&n=35&s=1",
  },
  {
    name: "cbs-explicit",
    title: "Select chunks",
    words: "Sixteen beams of five tokens each; a network that predicts the reward keeps the best four.",
    link: "#m=cbs-explicit&p=The+movie+was&w=4&k=4&l=5&t=0.7&n=35&s=1",
  },
  {
    name: "ivg",
    title: "Do both (IVG)",
    words: "Integrated Value Guidance: one value guides the tokens of every beam, another selects among the beams.",
    link: "#m=ivg&p=The+movie+was&b=1&w=4&k=4&l=5&t=0.7&n=35&s=1",
  },
  {
    name: "contrast",
    title: "Follow an instruction more",
    words: "No small model at all: the model guides itself by the difference that an instruction makes.",
    link: "#m=contrast&p=The+movie+was&b=2&t=0.7&n=35&s=1&i=A+wonderful+film%2C+the+best+of+the+year.",
  },
];

/** The cards; `choose(example)` is called for the one that was picked. */
export function showGallery(choose) {
  byId("gallery").replaceChildren(...EXAMPLES.map((example) => {
    const card = make("button", { type: "button", class: "example" }, make("b", {}, example.title), make("span", {}, example.words));
    card.addEventListener("click", () => choose(example));
    return card;
  }));
}

/** Show the recorded run of an example; returns false where it cannot be had, or a run has begun. */
export async function showRecorded(runner, name) {
  const begun = runner.count;
  const response = await fetch(`recorded/${name}.json`).catch(() => null);
  if (!response?.ok) return false;
  const run = await response.json();
  if (runner.count !== begun) return false; // meanwhile another one was picked or asked for
  runner.play(run);
  byId("recorded").replaceChildren(
    make("b", {}, "A recorded run"),
    `, not an answer of this server: method ${run.method}, seed ${run.seed}, with the film-review models that come with ivg ${run.version}, on ${run.made}. Press Run to ask this server.`,
  );
  byId("recorded").hidden = false;
  return true;
}
