// The words of the field that the page uses, each explained where it stands: a button that opens the popover.

import { make } from "./dom.js";
import { attachPopover } from "./popover.js";

const WORDS = {
  nats: "Unit of log-probability, by the natural logarithm. One nat more makes a token 2.7 times likelier, 0.69 nats twice as likely.",
  implicit: "The implicit value: log-probability under a small model after its tuning minus that before. It has a number for every next token.",
  explicit: "The explicit value: a small network, trained to predict from the beginning of an answer which reward the whole will get.",
  reward: "A reward model: a network that rates a whole answer.",
  FUDGE: "Future discriminators for generation (Yang and Klein 2021): a classifier says how likely the finished text has an attribute, for each candidate token.",
  GenARM: "Autoregressive reward model (Xu et al. 2025): a language model whose log-probabilities are rewards of tokens.",
  ARGS: "Alignment as reward-guided search (Khanov et al. 2024).",
  EFT: "Emulated fine-tuning (Mitchell et al. 2024): the difference of a small model after and before tuning guides the large one.",
  chunk: "A piece of the answer, as many tokens as the chunk length L says. After each chunk the best beams are kept.",
  chunks: "Pieces of the answer, as many tokens as the chunk length L says. After each chunk the best beams are kept.",
  value: "A number for the beginning of an answer; higher is better.",
  beam: "The beginning of a possible answer, while it is written. After each chunk the best are kept and continued.",
  beams: "Beginnings of possible answers, while they are written. After each chunk the best are kept and continued.",
  "KL divergence": "How far the guided distribution is from the model's own, in nats; 0: equal.",
  entropy: "How uncertain the model is about the next token, in nats; 0: certain.",
  "vocabulary head": "A last layer with one number for every token of the vocabulary.",
};

const PATTERN = new RegExp(`(?<![\\w-])(${Object.keys(WORDS).sort((a, b) => b.length - a.length).join("|")})(?![\\w-])`, "g");

/** `text` as nodes; the first occurrence of each known word is a button that explains it. */
export function explained(text) {
  const seen = new Set();
  return text.split(PATTERN).map((part) => {
    if (!WORDS[part] || seen.has(part)) return part;
    seen.add(part);
    return term(part);
  });
}

/** A word with its explanation. */
export function term(word, shown = word) {
  const button = make("button", { type: "button", class: "term" }, shown);
  attachPopover(button, () => [make("h3", {}, word), make("div", {}, WORDS[word])]);
  return button;
}
