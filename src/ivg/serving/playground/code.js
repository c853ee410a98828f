// The guided request as other programs send it: curl, OpenAI's Python client, a recipe for the command line.

import { pathFor } from "./api.js";

const KEY = "IVG_API_KEY";

/** A shell word. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A command for the shell. `secret`: the server wants a key, which the environment has. */
export function asCurl(body, secret) {
  const key = secret ? ` \\\n  -H "authorization: Bearer $${KEY}"` : "";
  return `curl -s ${quoted(address(pathFor(body)))} -H 'content-type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(body))}\n`;
}

/** A program with OpenAI's client. */
export function asPython(body, secret) {
  const { guidance, ...own } = body, chat = Boolean(body.messages);
  const given = Object.entries(own).map(([name, value]) => `    ${name}=${literal(value)},\n`).join("");
  return `${secret ? "import os\n\n" : ""}import openai  # pip install openai

client = openai.OpenAI(base_url=${literal(address("v1"))}, api_key=${secret ? `os.environ["${KEY}"]` : '"none"'})
answer = client.${chat ? "chat.completions" : "completions"}.create(
${given}    extra_body=${literal({ guidance })},
)
print(answer.choices[0].${chat ? "message.content" : "text"})
`;
}

/** A recipe, for `ivg generate`, `ivg serve` and all other commands. `embedded`: the models are those that come with ivg. `values`: of the method, where its name does not say them. */
export function asRecipe(body, model, embedded, values) {
  const { method, end_at_sentence, token_value: token, select_value: select, ...settings } = body.guidance;
  const search = { method, ...values, ...settings, ...(token ? { token } : {}), ...(select ? { select } : {}) };
  const sampling = { temperature: body.temperature, max_new_tokens: body.max_tokens, ...(end_at_sentence ? { end_at_sentence } : {}) };
  const asked = body.prompt ?? body.messages.at(-1).content, simple = !/[\r\n]/.test(asked);
  const system = body.messages?.find((m) => m.role === "system")?.content;
  const oneLine = system && !/[\r\n]/.test(system), more = oneLine ? ` --system ${quoted(system)}` : "";
  const missing = [
    ...(system && !oneLine ? ["the system message, which has several lines (--system)"] : []),
    ...(body.messages?.some((m) => m.role === "assistant") ? ["the conversation before this message"] : []),
  ];
  const note = missing.length ? `# not in this command: ${missing.join("; ")}\n` : "";
  const models = embedded ? "the models that come with ivg, as none are named" : `of the server, which serves ${model}, also needed: [models], and what else its [search] and [sampling] say`;
  return `# ${models}
# ivg generate --recipe guided.toml --seed ${body.seed}${body.messages ? more : ""} ${simple ? quoted(asked) : "- < prompt.txt"}
${note}
${table("search", search)}
${table("sampling", sampling)}`;
}

function address(path) {
  return new URL(path, new URL(".", location.href)).href;
}

function table(name, settings) {
  return `[${name}]\n${Object.entries(settings).map(([key, value]) => `${key} = ${toml(value)}\n`).join("")}`;
}

/** A string that TOML reads: as in JSON, and DEL escaped. */
const text = (value) => JSON.stringify(value).replaceAll("\u007f", "\\u007f");

function toml(value) {
  if (value !== null && typeof value === "object") return `{ ${Object.entries(value).map(([k, v]) => `${text(k)} = ${toml(v)}`).join(", ")} }`;
  return typeof value === "string" ? text(value) : String(value);
}

/** A literal of Python. */
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([k, v]) => `${text(k)}: ${literal(v)}`).join(", ")}}`;
  return typeof value === "string" ? text(value) : String(value);
}
