// Ask the question: once or again and again, with one budget or two.

import { AnswerPanel } from "./answer_panel.js";
import { Comparison } from "./comparison.js";
import { figuresOf } from "./measurements.js";
import { ask } from "./server.js";

const MOST_PAINTING_MS = 200;

/**
 * Asks, and shows the answers.
 *
 * `page` gives what a question needs: words(), picture() (a data URI), model, budgets() (the first
 * one's patches are shown), together(), repeats(), pauseMs(), and takes what comes of it:
 * showPatches(seen), measured(budget, figures), working(on), tell(error), calm().
 */
export class Asking {
  #page;
  #at;
  #work = null;
  #comparison;

  /** @param {Object<string, Element>} at answers, template, ratio, spoken */
  constructor(page, at) {
    this.#page = page;
    this.#at = at;
    this.#comparison = new Comparison(at.ratio);
  }

  get working() {
    return this.#work !== null;
  }

  stop() {
    this.#work?.abort();
  }

  /** Ask now, and again while the page says so. */
  async run() {
    if (this.#work) return;
    this.#work = new AbortController();
    const { signal } = this.#work;
    this.#page.working(true);
    try {
      let again = true;
      let first = true;
      while (again) {
        const due = performance.now() + this.#page.pauseMs();
        const waitMs = await this.#once(signal, first);
        first = false;
        again = this.#page.repeats() && !signal.aborted;
        if (again) await pause(Math.max(due - performance.now(), waitMs), signal);
        again &&= this.#page.repeats() && !signal.aborted;
      }
    } catch (error) {
      this.#page.tell(error);
    } finally {
      this.#work = null;
      this.#page.working(false);
    }
  }

  /** Ask about one picture; return how many ms the server wants to be left alone. */
  async #once(stopped, first) {
    const words = this.#page.words();
    const url = await this.#page.picture();
    const budgets = this.#page.budgets();
    const together = this.#page.together();
    const failed = new AbortController(); // one answer's error stops the other one
    const signal = AbortSignal.any([stopped, failed.signal]);
    this.#at.answers.replaceChildren();
    this.#at.answers.hidden = false;
    this.#comparison.clear();
    const panels = budgets.map((budget) =>
      new AnswerPanel(this.#at.template, this.#at.answers, budget));
    const asks = budgets.map((budget, index) => {
      const question = { model: this.#page.model, url, words, visualTokens: budget };
      const shared = together && budgets.length > 1;
      return () => this.#answer(panels[index], question, { shared, marks: index === 0 }, signal);
    });
    if (first) this.#at.answers.scrollIntoView({ block: "nearest" });
    try {
      const answers = together ? await Promise.all(asks.map((begin) => begin())) : await inTurn(asks);
      const longestMs = Math.max(...panels.map((panel) => panel.spentMs));
      for (const panel of panels) panel.scaleTo(longestMs);
      if (answers.length > 1) this.#comparison.add(answers, budgets, together);
      this.#page.calm();
      return 0;
    } catch (error) {
      failed.abort();
      if (error.status !== 429 || !this.#page.repeats()) throw error;
      this.#page.tell(error);
      return 1000 * (error.waitSeconds ?? 1);
    }
  }

  async #answer(panel, question, { shared, marks }, signal) {
    const budget = question.visualTokens;
    try {
      const answer = await ask(question, {
        seen: (seen) => marks && this.#page.showPatches(seen),
        piece: (piece) => panel.add(piece),
      }, signal);
      panel.end(answer);
      this.#at.spoken.textContent = `${budget} tokens: ${answer.text}`;
      this.#page.measured(budget, figuresOf(answer, shared));
      return answer;
    } catch (error) {
      panel.fail(error.name === "AbortError" ? "Stopped." : "No answer.");
      throw error;
    }
  }
}

async function inTurn(asks) {
  const answers = [];
  for (const begin of asks) {
    await painted(); // drawing the last answer is no part of the next one's time
    answers.push(await begin());
  }
  return answers;
}

/** Wait until the browser has drawn what changed; a page that is not shown draws nothing. */
function painted() {
  return new Promise((done) => {
    requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)));
    setTimeout(done, MOST_PAINTING_MS);
  });
}

function pause(ms, signal) {
  return new Promise((done) => {
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      done();
    });
  });
}
