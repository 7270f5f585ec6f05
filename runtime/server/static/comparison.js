// Say how answers from few tokens compare with answers from all of them.

import { median } from "./measurements.js";

const RATIOS = [
  ["first", "First token", (answer) => answer.firstMs, "sooner", "later"],
  ["whole", "Whole answer", (answer) => answer.wholeMs, "sooner", "later"],
  ["read", "Tokens read", (answer) => answer.usage.prompt_tokens, "fewer", "more"],
];

/** The ratios of pairs of answers to one question about one picture. */
export class Comparison {
  #place;
  #pairs = new Map();

  constructor(place) {
    this.#place = place;
  }

  clear() {
    this.#place.hidden = true;
  }

  /** Add a pair, and show the median of the pairs of its kind and whether it says the same. */
  add([few, all], budgets, together) {
    const kind = `${budgets} ${together}`;
    const pairs = [...(this.#pairs.get(kind) ?? []), [few, all]];
    this.#pairs.set(kind, pairs);
    const figures = document.createElement("dl");
    figures.className = "figures";
    figures.append(...RATIOS.map((ratio) => figure(pairs, ratio)));
    const said = document.createElement("p");
    const words = [few.text === all.text ? "Both say the same." : "They say different things."];
    if (pairs.length > 1) words.push(`The ratios are medians of ${pairs.length} such pairs.`);
    if (together) words.push("Both ran at once and shared the machine; “In turn” times each alone.");
    said.className = "said";
    said.textContent = words.join(" ");
    this.#place.replaceChildren(figures, said);
    this.#place.hidden = false;
  }
}

function figure(pairs, [name, words, of, better, worse]) {
  const ratio = median(pairs.map(([few, all]) => of(all) / of(few)));
  const factor = ratio >= 1 ? ratio : 1 / ratio;
  const pair = document.createElement("div");
  const dt = document.createElement("dt");
  const dd = document.createElement("dd");
  dt.textContent = words;
  dd.textContent = `${factor.toFixed(factor < 10 ? 1 : 0)}× ${ratio >= 1 ? better : worse}`;
  dd.dataset.ratio = name;
  pair.append(dt, dd);
  return pair;
}
