// Show one answer as it comes, and then where its time went.

import { inMs } from "./measurements.js";

const STAGES = [
  ["picture", "Picture", ["read", "preprocess"]],
  ["wait", "Waited", ["queue"]],
  ["encode", "Encoded", ["encode"]],
  ["prefill", "Prompt read", ["prefill"]],
  ["decode", "Written", ["decode"]],
];

/** One answer on the page. */
export class AnswerPanel {
  #root;
  #text;
  spentMs = 0; // in the server, all stages together

  constructor(template, place, budget) {
    this.#root = template.content.firstElementChild.cloneNode(true);
    this.#text = this.#root.querySelector(".text");
    this.#root.querySelector("h3").textContent = `${budget} tokens`;
    this.#root.dataset.budget = budget;
    this.#root.dataset.state = "waiting";
    this.#text.setAttribute("aria-busy", "true");
    place.append(this.#root);
  }

  add(piece) {
    this.#root.dataset.state = "writing";
    this.#text.append(piece);
  }

  /** Show what the answer took. */
  end(answer) {
    this.#close(answer.server.finish === "stop" ? "done" : answer.server.finish);
    const spent = answer.server.milliseconds;
    const parts = STAGES.map(([name, words, stages]) => ({
      name, words, ms: stages.reduce((sum, stage) => sum + (spent[stage] ?? 0), 0),
    })).filter(({ name, ms }) => ms > 0.05 || name === "encode");
    this.spentMs = parts.reduce((sum, { ms }) => sum + ms, 0);
    this.#root.querySelector(".bar").replaceChildren(...parts.map(({ name, ms }) => {
      const part = document.createElement("span");
      part.className = name;
      part.style.flexGrow = ms;
      return part;
    }));
    const { prompt_tokens: read, completion_tokens: written } = answer.usage;
    this.#root.querySelector(".stages").replaceChildren(
      entry("First token", `${inMs(answer.firstMs)} ms`),
      entry("Whole answer", `${inMs(answer.wholeMs)} ms`),
      ...parts.map(({ name, words, ms }) => entry(words, `${inMs(ms)} ms`, name)),
      entry("Tokens read", `${read}`),
      entry("Tokens written", `${written}`),
    );
  }

  /** Draw the bar of stages to the scale of the longest one beside it. */
  scaleTo(longestMs) {
    this.#root.querySelector(".bar").style.width = `${(100 * this.spentMs) / longestMs}%`;
  }

  /** Say that it ended early. */
  fail(words) {
    this.#close("failed");
    if (!this.#text.textContent) this.#text.textContent = words;
  }

  #close(state) {
    this.#root.dataset.state = state;
    this.#text.setAttribute("aria-busy", "false");
  }
}

function entry(term, value, kind = "") {
  const pair = document.createElement("div");
  const dt = document.createElement("dt");
  const dd = document.createElement("dd");
  dt.textContent = term;
  dt.className = kind;
  dd.textContent = value;
  pair.append(dt, dd);
  return pair;
}
