// The HTTP API: list of models, streamed completions, errors.

/** An error of the server or of the connection. `param`: the field that the server names. */
export class ServerError extends Error {
  constructor(message, { param = null, status = 0, retry = null } = {}) {
    super(message);
    Object.assign(this, { param, status, retry });
  }
}

const headers = (key) => ({ "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) });

/** GET v1/models. */
export async function models(key) {
  return (await request("v1/models", { headers: headers(key) })).json();
}

/** The path that answers a body. */
export const pathFor = (body) => (body.messages ? "v1/chat/completions" : "v1/completions");

/**
 * POST v1/completions, or v1/chat/completions for a body with messages, as a stream.
 * @param {object} body the request; `stream` and its options are added here
 * @param {{key?: string, signal?: AbortSignal}} how
 * @yields {{type: "text"|"thinking"|"beams"|"tokens"|"end", data: any}}
 */
export async function* complete(body, { key, signal }) {
  const wanted = { ...body, stream: true, stream_options: { include_usage: true, include_beams: true } };
  const response = await request(pathFor(body), { method: "POST", headers: headers(key), body: JSON.stringify(wanted), signal });
  let done = false;
  for await (const { event, data } of events(response.body)) {
    if (data === "[DONE]") {
      done = true; // the connection ends by itself
      continue;
    }
    const found = parseJSON(data);
    if (found.error) throw new ServerError(found.error.message, { param: found.error.param });
    if (event === "ivg.beams") yield { type: "beams", data: found };
    else if (event === "ivg.tokens") yield { type: "tokens", data: found.tokens };
    else yield* chunkEvents(found);
  }
  if (!done) throw new ServerError("The connection closed before the answer was complete.");
}

function* chunkEvents(chunk) {
  const choice = chunk.choices?.[0];
  if (choice?.delta?.reasoning_content) yield { type: "thinking", data: choice.delta.reasoning_content };
  const text = choice?.text ?? choice?.delta?.content;
  if (text) yield { type: "text", data: text };
  if (chunk.ivg || choice?.finish_reason) yield { type: "end", data: { finish: choice?.finish_reason, ...chunk.ivg } };
}

function parseJSON(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ServerError("The server sent a response that this page cannot read.");
  }
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is “ivg serve” still running?");
  }
  if (response.ok) return response;
  const retry = response.headers.get("retry-after");
  const { message, param } = await response.json().then((b) => b.error ?? {}, () => ({}));
  throw new ServerError(message ?? `The server answered ${response.status} ${response.statusText}.`, { param, status: response.status, retry });
}

/** The server-sent events of a response body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/);
        const of = (name) => lines.filter((l) => l.startsWith(`${name}:`)).map((l) => l.slice(name.length + 1).replace(/^ /, ""));
        const data = of("data");
        if (data.length) yield { event: of("event")[0] ?? "message", data: data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
