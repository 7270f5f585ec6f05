// Keep what was measured with each budget, and show it beside the slider and as a table.

const KEPT_RUNS = 25;

/** Milliseconds for people: three figures. */
export function inMs(ms) {
  return ms < 10 ? ms.toFixed(1) : ms.toFixed(0);
}

/** Return the figures of one answer. */
export function figuresOf(answer, shared) {
  return {
    first: answer.firstMs,
    whole: answer.wholeMs,
    server: answer.server.milliseconds.total,
    read: answer.usage.prompt_tokens,
    shared,
  };
}

/** What was measured since the page was opened. */
export class Measurements {
  #runs = new Map();

  add(budget, figures) {
    const runs = [...(this.#runs.get(budget) ?? []), figures];
    this.#runs.set(budget, runs.slice(-KEPT_RUNS));
  }

  /** Return medians; runs that shared the machine count only where there are no others. */
  of(budget) {
    const runs = this.#runs.get(budget) ?? [];
    const alone = runs.filter((run) => !run.shared);
    const used = alone.length ? alone : runs;
    if (!used.length) return null;
    const names = ["first", "whole", "server", "read"];
    const medians = names.map((name) => [name, median(used.map((run) => run[name]))]);
    return { ...Object.fromEntries(medians), runs: used.length, shared: !alone.length };
  }

  /** Write the figures of a budget into the elements marked `data-figure`. */
  showBeside(list, budget) {
    const told = this.of(budget);
    const words = told && {
      first: `${inMs(told.first)} ms`, whole: `${inMs(told.whole)} ms`, read: `${told.read}`,
    };
    for (const place of list.querySelectorAll("[data-figure]")) {
      place.textContent = words?.[place.dataset.figure] ?? "–";
    }
  }

  /** Write a row for each budget that was measured. */
  showTable(body, budgets, chosen) {
    const told = budgets.map((budget) => [budget, this.of(budget)]).filter(([, of]) => of);
    const longest = Math.max(...told.map(([, of]) => of.whole));
    body.replaceChildren(...told.flatMap(([budget, of]) =>
      [row(budget, of, budget === chosen), bar(of, longest)]));
  }
}

function row(budget, of, chosen) {
  const line = document.createElement("tr");
  if (chosen) line.setAttribute("aria-current", "true");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = budget;
  const runs = of.shared ? `${of.runs}, both at once` : `${of.runs}`;
  const cells = [inMs(of.first), inMs(of.whole), inMs(of.server), `${of.read}`, runs].map((text) => {
    const cell = document.createElement("td");
    cell.textContent = text;
    return cell;
  });
  line.append(head, ...cells);
  return line;
}

function bar(of, longest) {
  const line = document.createElement("tr");
  const cell = document.createElement("td");
  const whole = document.createElement("span");
  const first = document.createElement("span");
  whole.className = "length";
  whole.style.width = `${(100 * of.whole) / longest}%`;
  first.style.width = `${(100 * of.first) / of.whole}%`;
  line.setAttribute("aria-hidden", "true");
  cell.colSpan = 6;
  whole.append(first);
  cell.append(whole);
  line.append(cell);
  return line;
}

/** Return the middle one of numbers. */
export function median(numbers) {
  const sorted = [...numbers].sort((one, other) => one - other);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
