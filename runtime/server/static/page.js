// The live page: join picture, question, server and answers.

import { Asking } from "./asking.js";
import { BudgetSlider } from "./budget_slider.js";
import { Camera } from "./camera.js";
import { Measurements } from "./measurements.js";
import { listenForPictures } from "./picture_input.js";
import { Pictures } from "./pictures.js";
import { Problem } from "./problem.js";
import { metadata, useKey } from "./server.js";
import { Stage } from "./stage.js";

const at = (id) => document.getElementById(id);

let server = null; // what /v1/metadata told
let keyGiven = false;

const problem = new Problem(at("problem"));
const stage = new Stage({
  frame: at("frame"), patches: at("patches"), live: at("live"),
  nothing: at("nothing"), legend: at("legend"),
});
const camera = new Camera(at("live"));
const pictures = new Pictures(stage, camera, tell);
const measurements = new Measurements();
const slider = new BudgetSlider(
  { input: at("budget"), output: at("chosen"), ticks: at("ticks") }, showBudget);
const asking = new Asking({
  words, picture: () => pictures.urlToAskAbout(), budgets, repeats, tell, measured,
  get model() { return server.model; },
  together: () => comparison() === "at-once",
  pauseMs: () => 1000 * Math.max(1, at("seconds").valueAsNumber || 1),
  showPatches: (seen) => stage.showPatches(seen),
  calm: () => problem.clear(),
  working: showWorking,
}, {
  answers: at("answers"), template: at("answer-template"), ratio: at("ratio"),
  spoken: at("spoken"),
});

// The server

async function connect() {
  try {
    server = await metadata();
  } catch (error) {
    at("model").textContent = "Not connected";
    tell(error);
    return;
  }
  problem.clear();
  at("key-form").hidden = true;
  const [first] = server.budgets;
  slider.fill(server.budgets.map((budget) => budget.visual_tokens),
    first.patch_rows * first.patch_columns);
  pictures.mostBytes = server.limits.max_body_bytes;
  document.title = `${server.model} · Foveate`;
  at("model").textContent =
    [server.model, first.reducer, first.precision.toUpperCase(), server.backend].join(" · ");
  at("compare").disabled = slider.all.length < 2;
  at("most").textContent = slider.most === slider.patches ? `all ${slider.most} tokens`
    : `the largest budget, ${slider.most} tokens`;
  if (server.backend === "none") {
    problem.show("This server encodes only", "It shows which patches are kept and cannot answer: " +
      "start it with --llm-url, or without --role encoder.");
  }
  showBudget();
}

function tell(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) {
    at("key-form").hidden = false;
    at("key").focus();
    if (!keyGiven) return; // the form says what is missing
  }
  problem.tell(error);
}

async function submitKey(event) {
  event.preventDefault();
  useKey(at("key").value);
  at("key").value = "";
  keyGiven = true;
  await connect();
  if (at("key-form").hidden) at("question").focus();
}

// The picture

async function takePicture(blob) {
  problem.clear();
  asking.stop();
  if (camera.on) stopCamera();
  try {
    await pictures.use(blob);
    showBudget();
  } catch (error) {
    tell(error);
  }
}

async function switchCamera() {
  problem.clear();
  if (camera.on) {
    stopCamera();
    return;
  }
  try {
    await camera.start(stopCamera);
  } catch (error) {
    tell(error);
    return;
  }
  pictures.clear();
  stage.showCamera(true);
  showCameraState();
}

function stopCamera() {
  if (at("again").checked) asking.stop();
  camera.stop();
  stage.showCamera(false);
  showCameraState();
}

function showCameraState() {
  at("camera").textContent = camera.on ? "Stop the camera" : "Start the camera";
  at("again").disabled = at("seconds").disabled = !camera.on;
}

// The question

function words() {
  const written = at("question").value.trim();
  if (written) return written;
  at("question").focus();
  throw new Error("Write a question first.");
}

function repeats() {
  return camera.on && at("again").checked;
}

function comparison() {
  return document.querySelector("input[name=compare]:checked").value;
}

function budgets() {
  const alone = comparison() === "no" || slider.value === slider.most;
  return alone ? [slider.value] : [slider.value, slider.most];
}

function showBudget() {
  showMeasured();
  explainComparison();
  if (server && !asking.working) pictures.preview(slider.value);
}

function explainComparison() {
  const explained = {
    "no": "",
    "at-once": "Both answers share the machine while they are written.",
    "in-turn": "One after the other, so that each has the machine to itself.",
  };
  at("compare-hint").textContent = comparison() !== "no" && budgets().length === 1
    ? "Choose fewer tokens above: there is nothing to compare." : explained[comparison()];
}

function measured(budget, figures) {
  measurements.add(budget, figures);
  showMeasured();
  at("measured").hidden = false;
}

function showMeasured() {
  measurements.showBeside(at("beside"), slider.value);
  measurements.showTable(at("runs"), slider.all, slider.value);
}

async function submitQuestion(event) {
  event?.preventDefault();
  if (asking.working) return;
  problem.clear();
  if (!server) await connect();
  if (!server) return;
  pictures.endPreview();
  await asking.run();
}

function showWorking(on) {
  at("ask").setAttribute("aria-disabled", String(on));
  at("stop").setAttribute("aria-disabled", String(!on));
}

listenForPictures(at("file"), at("stage"), takePicture, (said) => problem.show("", said));
at("camera").addEventListener("click", switchCamera);
at("show-patches").addEventListener("change", (event) => {
  at("stage").classList.toggle("bare", !event.target.checked);
});
at("key-form").addEventListener("submit", submitKey);
at("ask-form").addEventListener("submit", submitQuestion);
at("stop").addEventListener("click", () => asking.stop());
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submitQuestion();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && asking.stop());
for (const choice of document.querySelectorAll("input[name=compare]")) {
  choice.addEventListener("change", explainComparison);
}
connect();
