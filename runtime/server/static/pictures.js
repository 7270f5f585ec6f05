// Hold the picture that is asked about: a file, or what the camera sees when a question is asked.

import { dataUrl } from "./picture_input.js";
import { keptPatches } from "./server.js";

const PREVIEW_PAUSE_MS = 120;
const JSON_AROUND_BYTES = 10_000;

/** The picture of the page, and the patches that a budget keeps of it. */
export class Pictures {
  #stage;
  #camera;
  #tell;
  #preview = null;
  #current = null;
  mostBytes = Infinity; // of a request

  constructor(stage, camera, tell) {
    this.#stage = stage;
    this.#camera = camera;
    this.#tell = tell;
  }

  /** Use a file. */
  async use(blob) {
    const url = await dataUrl(blob);
    const room = this.mostBytes - JSON_AROUND_BYTES;
    if (url.length > room) {
      throw new Error(`The picture has ${inMb(blob.size)}, and the server takes ` +
        `${inMb(room * 0.75)}. Make it smaller.`);
    }
    await this.#stage.show(blob);
    this.#current = { blob, url };
  }

  /** Forget the picture: the camera gives the next one. */
  clear() {
    this.endPreview();
    this.#current = null;
  }

  /** Return the picture to ask about, as a data URI. */
  async urlToAskAbout() {
    if (this.#camera.on) await this.use(await this.#camera.take());
    if (!this.#current) throw new Error("Open a picture or start the camera first.");
    return this.#current.url;
  }

  /** Show which patches a budget would keep, in a moment. */
  preview(visualTokens) {
    this.endPreview();
    if (!this.#current) return;
    this.#preview = new AbortController();
    const { signal } = this.#preview;
    const { blob } = this.#current;
    setTimeout(async () => {
      if (signal.aborted) return;
      try {
        const seen = await keptPatches(blob, visualTokens, signal);
        if (!signal.aborted) this.#stage.showPatches(seen);
      } catch (error) {
        this.#tell(error);
      }
    }, PREVIEW_PAUSE_MS);
  }

  endPreview() {
    this.#preview?.abort();
  }
}

function inMb(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
