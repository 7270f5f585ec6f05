// Show in words what went wrong.

const TITLES = new Map([
  [401, "The key is not right"],
  [408, "Too late"],
  [413, "The picture is too large"],
  [429, "The server is full"],
  [504, "Too late"],
]);

/** The place of the page where errors stand; screen readers read it out at once. */
export class Problem {
  #place;

  constructor(place) {
    this.#place = place;
  }

  /** Show an error; its message is for people. */
  tell(error) {
    this.show(TITLES.get(error.status) ?? (error.status >= 500 ? "The server failed" : ""),
      error.message);
  }

  show(title, words) {
    const told = document.createElement("p");
    if (title) {
      const strong = document.createElement("strong");
      strong.textContent = `${title}. `;
      told.append(strong);
    }
    told.append(words);
    this.#place.replaceChildren(told);
    this.#place.hidden = false;
  }

  clear() {
    this.#place.hidden = true;
    this.#place.replaceChildren();
  }
}
