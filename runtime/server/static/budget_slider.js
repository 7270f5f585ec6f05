// Choose one of the budgets that the bundle holds.

/** A slider whose stops are budgets. */
export class BudgetSlider {
  #at;
  #budgets = [];

  /** @param {Object<string, Element>} at input, output, ticks */
  constructor(at, changed) {
    this.#at = at;
    at.input.addEventListener("input", () => {
      this.#tell();
      changed(this.value);
    });
  }

  /** @param {number[]} budgets the first one is chosen @param {number} patches in a picture */
  fill(budgets, patches) {
    this.#budgets = [...budgets].sort((one, other) => one - other);
    this.patches = patches;
    const { input, ticks } = this.#at;
    input.max = this.#budgets.length - 1;
    input.value = this.#budgets.indexOf(budgets[0]);
    input.disabled = this.#budgets.length < 2;
    ticks.replaceChildren(...this.#budgets.map((budget) => {
      const tick = document.createElement("span");
      tick.textContent = budget;
      return tick;
    }));
    this.#tell();
  }

  get value() {
    return this.#budgets[Number(this.#at.input.value)];
  }

  get most() {
    return this.#budgets[this.#budgets.length - 1];
  }

  get all() {
    return this.#budgets;
  }

  #tell() {
    const words = `${this.value} of ${this.patches}`;
    this.#at.output.textContent = words;
    this.#at.input.setAttribute("aria-valuetext", `${words} tokens`);
  }
}
