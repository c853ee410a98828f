// A conversation with a chat model. Each answer goes on in its own way, so there are two: with the model alone, and guided.

import { byId, make } from "./dom.js";

/** What was said before the message that is asked now; `base` and `guided` are messages of OpenAI's API. */
export class Conversation {
  constructor() {
    this.clear();
  }

  clear() {
    this.base = [];
    this.guided = [];
  }

  /** The message and its two answers belong to it from now on. */
  add(message, base, guided) {
    const turns = (text) => [{ role: "user", content: message }, { role: "assistant", content: text }];
    this.base = [...this.base, ...turns(base)];
    this.guided = [...this.guided, ...turns(guided)];
  }

  get length() {
    return this.base.length / 2;
  }
}

/** The turns before an answer, as elements. */
export function showTurns(turns) {
  const who = { user: "You", assistant: "Model" };
  return turns.map((t) => make("p", { class: `turn ${t.role}` }, make("b", {}, who[t.role]), t.content));
}

/** The buttons below the answers of a chat model, for what can be done now. */
export function showConversation(conversation, { done }) {
  byId("continue").hidden = !done;
  byId("restart").hidden = !conversation.length;
  const said = conversation.length === 1 ? "One message and its answers" : `${conversation.length} messages and their answers`;
  byId("conversation-note").textContent = conversation.length
    ? `${said} come before the next one; each side goes on with its own answers.`
    : done ? "Go on with both answers, each side with its own." : "";
}
