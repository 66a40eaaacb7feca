// The gateway: calls with the key that was put in, and completions as they come.

import { $ } from "./dom.js";

export const GONE = "The gateway does not answer. Is it still running?";
export const KEY_WANTED =
  "The gateway wants an API key: put it in on the page Playground, under “Tree shape, seed, model”.";

export const ENGINES_TIMEOUT = 12000; // of what engines answer, which they do between two steps

export class RequestFailed extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0: in the middle of a stream
  }
}

// fetch with the API key, if there is one.
export function call(path, init = {}) {
  const key = $("api_key").value;
  return fetch(path, { ...init, headers: { ...init.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) } });
}

// What a GET answers, or {state, problem}: why it does not, as a sentence.
export async function read(path, timeout) {
  try {
    const response = await call(path, { signal: AbortSignal.timeout(timeout) });
    if (response.status === 401) return { state: "key", problem: KEY_WANTED };
    return response.ok ? await response.json() : { state: "down", problem: `The gateway answers ${response.status}.` };
  } catch {
    return { state: "down", problem: GONE };
  }
}

// The chunks of a streamed completion, until [DONE]. Throws RequestFailed for what the gateway refuses.
export async function* chunks(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await call(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (response.status === 401) throw new RequestFailed(401, KEY_WANTED);
  if (!response.ok) throw new RequestFailed(response.status, await errorText(response));
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new RequestFailed(0, chunk.error.message);
    yield chunk;
  }
  throw new RequestFailed(0, "The connection ended in the middle of the answer.");
}

async function errorText(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The gateway answered ${response.status} ${response.statusText}`;
  }
}

// The data of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
