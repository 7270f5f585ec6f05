// Talk to the server that this page came from, and to no other.

import { eventsOf } from "./event_stream.js";

let key = ""; // in memory only

/** Use a key for all requests from now on. */
export function useKey(given) {
  key = given.trim();
}

/** What the server, or the way to it, has against a request; the message is for people. */
export class ServerError extends Error {
  constructor(message, status = 0, waitSeconds = null) {
    super(message);
    this.status = status;
    this.waitSeconds = waitSeconds;
  }
}

/** Return what the server tells of itself and its bundle. */
export async function metadata() {
  return (await send("v1/metadata")).json();
}

/** Return which patches of a picture are kept with a budget. */
export async function keptPatches(blob, visualTokens, signal) {
  const path = `encode?format=json&visual_tokens=${visualTokens}`;
  const headers = { "Content-Type": "application/octet-stream" };
  return (await send(path, { method: "POST", body: blob, headers, signal })).json();
}

/**
 * Ask about a picture; nothing that the server remembers is used, so that times are honest.
 * @param {{model: string, url: string, words: string, visualTokens: number}} question
 * @param {{seen: function(object), piece: function(string)}} told called as the answer comes
 * @returns {Promise<object>} usage, finish, the server's own times, and when what came, in ms
 */
export async function ask(question, told, signal) {
  const body = JSON.stringify({
    model: question.model,
    messages: [{ role: "user", content: [
      { type: "image_url", image_url: { url: question.url } },
      { type: "text", text: question.words },
    ] }],
    visual_tokens: question.visualTokens,
    stream: true,
    stream_options: { include_usage: true },
    patches: true,
    fresh: true,
  });
  const started = performance.now();
  const headers = { "Content-Type": "application/json" };
  const response = await send("v1/chat/completions", { method: "POST", body, headers, signal });
  const answer = { text: "", firstMs: null };
  let ended = false;
  try {
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") ended = true;
      else take(JSON.parse(data), answer, told, started);
    }
  } catch (error) {
    throw inWords(error);
  }
  if (!ended) throw new ServerError("The answer broke off: the server closed the connection.");
  answer.wholeMs = performance.now() - started;
  answer.firstMs ??= answer.wholeMs;
  return answer;
}

function take(event, answer, told, started) {
  if (event.error) throw new ServerError(event.error.message, 500);
  const piece = event.choices?.[0]?.delta?.content;
  if (piece) {
    answer.firstMs ??= performance.now() - started;
    answer.text += piece;
    told.piece(piece);
  }
  if (event.usage) answer.usage = event.usage;
  if (event.foveate?.milliseconds) answer.server = event.foveate;
  else if (event.foveate?.pictures) told.seen(event.foveate.pictures[0]);
}

async function send(path, options = {}) {
  try {
    const headers = new Headers(options.headers);
    if (key) headers.set("Authorization", `Bearer ${key}`);
    const response = await fetch(path, { ...options, headers, cache: "no-store" });
    if (response.ok) return response;
    throw await refusal(response);
  } catch (error) {
    throw inWords(error);
  }
}

async function refusal(response) {
  const told = await response.json().catch(() => null);
  const wait = Number(response.headers.get("Retry-After")) || null;
  const words = told?.error?.message ?? `The server answered with status ${response.status}.`;
  return new ServerError(words, response.status, wait);
}

function inWords(error) {
  if (error instanceof ServerError || error.name === "AbortError") return error;
  if (error instanceof TypeError && /header|ISO-8859|ByteString/i.test(error.message)) {
    return new ServerError("A key cannot have such characters. Copy it again.", 401);
  }
  return new ServerError("The server does not answer. Check that it runs, then try again.");
}
