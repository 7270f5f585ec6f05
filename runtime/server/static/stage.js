// Show the picture that is asked about, its patches, and the live camera.

import { drawPatches, legendOf } from "./overlay.js";

/** The large picture of the page. */
export class Stage {
  #at;
  #url = null;

  /** @param {Object<string, Element>} at frame, patches, live, nothing, legend */
  constructor(at) {
    this.#at = at;
  }

  /** Show a picture file in place of the last one, without patches. */
  async show(blob) {
    const { frame } = this.#at;
    const url = URL.createObjectURL(blob);
    const loaded = new Image();
    loaded.src = url;
    try {
      await loaded.decode();
    } catch {
      URL.revokeObjectURL(url);
      throw new Error("This browser cannot show the file. Save it as a JPEG or PNG first.");
    }
    frame.src = url;
    await frame.decode();
    if (this.#url) URL.revokeObjectURL(this.#url);
    this.#url = url;
    frame.hidden = false;
    this.clearPatches();
    this.#arrange();
  }

  /** Show the camera large until a frame of it is asked about, and small from then on. */
  showCamera(on) {
    if (on) {
      this.#at.frame.hidden = true;
      this.clearPatches();
    }
    this.#at.live.hidden = !on;
    this.#arrange();
  }

  showPatches(seen) {
    drawPatches(this.#at.patches, seen);
    this.#at.patches.removeAttribute("hidden");
    this.#at.legend.replaceChildren(...legendOf(seen).map(({ fate, count, words }) => {
      const item = document.createElement("span");
      item.className = fate;
      item.dataset.count = count;
      item.textContent = `${count} ${words}`;
      return item;
    }));
  }

  clearPatches() {
    this.#at.patches.setAttribute("hidden", "");
    this.#at.patches.replaceChildren();
    this.#at.legend.replaceChildren();
  }

  #arrange() {
    const { frame, live, nothing } = this.#at;
    if (frame.hidden && this.#url && live.hidden) frame.hidden = false;
    nothing.hidden = !frame.hidden || !live.hidden;
    live.classList.toggle("small", !frame.hidden);
  }
}
