// Show the camera, and take frames from it.

/** A camera whose live picture is in a video element. */
export class Camera {
  #video;
  #stream = null;

  constructor(video) {
    this.#video = video;
  }

  get on() {
    return this.#stream !== null;
  }

  /** Start it; `ended` is called when it goes away by itself. */
  async start(ended) {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new Error(
        "Browsers give the camera to https pages and to localhost only. Reach the server through " +
        "a tunnel (ssh -L 8600:127.0.0.1:8600 robot) and open http://127.0.0.1:8600.");
    }
    try {
      this.#stream = await navigator.mediaDevices.getUserMedia(
        { audio: false, video: { facingMode: "environment", width: { ideal: 1280 } } });
    } catch (error) {
      throw new Error(wordsOf(error));
    }
    this.#stream.getVideoTracks()[0].addEventListener("ended", () => {
      this.stop();
      ended();
    });
    this.#video.srcObject = this.#stream;
    await this.#video.play();
  }

  stop() {
    for (const track of this.#stream?.getTracks() ?? []) track.stop();
    this.#stream = null;
    this.#video.srcObject = null;
  }

  /** Return the picture of this moment as a JPEG file. */
  async take() {
    const canvas = document.createElement("canvas");
    canvas.width = this.#video.videoWidth;
    canvas.height = this.#video.videoHeight;
    if (!canvas.width) throw new Error("The camera has not given a picture yet. Ask again.");
    canvas.getContext("2d").drawImage(this.#video, 0, 0);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
    if (blob === null) throw new Error("This browser could not write the frame as a JPEG.");
    return blob;
  }
}

function wordsOf(error) {
  if (error.name === "NotAllowedError") {
    return "The camera was not allowed. Allow it for this page beside the address, then try again.";
  }
  if (error.name === "NotFoundError") return "This machine has no camera. Open a picture instead.";
  if (error.name === "NotReadableError") return "Another program uses the camera. Close it first.";
  return `The camera did not start (${error.name}: ${error.message}).`;
}
