"""Build a bundle from a checkpoint, step by step.

The steps are: plan, read the calibration frames, export the vision graph of each budget, quantize,
export the language model, publish. The bundle is written completely or not at all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from calibration.frames.dataset import CalibrationSet
from calibration.int8.bundle import collect
from calibration.int8.graphs import Int8Graphs
from calibration.int8.resume import ResumeFolder
from engines import __version__
from engines.bundle import write_bundle
from engines.manifest import Manifest
from engines.progress_bar import Progress
from engines.trt.batch_profile import usual_batch
from engines.trt.on_device import write_device_files
from export.build.plan import USUAL_OPSET, BuildOptions, BuildPlan, plan_build
from export.build.stopwatch import Steps
from export.build.tiles import notes_of_clips, write_newline
from export.build.vision import export_vision
from export.kept_parts import KeptParts
from export.language.language_models import export_language_models
from runtime.vision.layouts import layout_from

_READING_S = 30.0
"""For the frames; a long recording takes more."""

_TOOLS = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")


@dataclass(frozen=True)
class BuildReport:
    """What was built.

    Attributes:
        bundle: its directory.
        bytes: size of each file in it.
        seconds: how long each step took.
        total_seconds: of all, opening the checkpoint and hashing the bundle included.
        notes: what did not come out as asked for, in words.
        int8: how INT8 came about; None for other precisions.
        frames: what it was calibrated on.
    """

    bundle: Path
    bytes: dict[str, int]
    seconds: dict[str, float]
    total_seconds: float
    notes: tuple[str, ...] = ()
    int8: Int8Graphs | None = None
    frames: CalibrationSet | None = None


def build_bundle(
    options: BuildOptions, progress: Progress = lambda line, done: None
) -> BuildReport:
    """Build a bundle.

    Raises:
        GateError: INT8 agrees too little with FP32; nothing is left.
        FoveateError: the options, the checkpoint or the disk do not allow it; nothing is left.
    """
    begun = time.perf_counter()
    progress(f"Opening {options.model}", 0.0)
    plan = plan_build(options)
    steps = Steps(progress, _expected_seconds(plan, options))
    progress(f"Needs {plan.cost.describe()}", 0.0)
    frames = None
    if options.int8.frames is not None:
        with steps.step("frames", "Reading frames") as part:
            preprocessing, side = plan.checkpoint.preprocessing, plan.checkpoint.patch_side
            layout = layout_from(preprocessing, plan.tiles, (side, side))
            patch_pixels = preprocessing.height // side
            frames = collect(options.int8, preprocessing, layout, patch_pixels, part)
    unfinished, kept = ResumeFolder(options.out), KeptParts(options.out, plan.checkpoint)
    with (
        unfinished.kept(),
        kept.until_done(),
        write_bundle(options.out, overwrite=options.overwrite) as draft,
    ):
        vision = export_vision(plan, options, frames, draft, kept, steps.step)
        with steps.step("language_model", "Language model") as part:
            language = export_language_models(
                plan.checkpoint, draft.root, options.decoders, kept, progress=part
            )
        squares = 1 if plan.tiles is None else plan.tiles.most_squares
        write_device_files(draft.root, vision.files, plan.target, usual_batch(squares))
        if plan.tiles is not None:
            write_newline(plan.checkpoint, plan.tiles, draft)
        draft.describe(
            Manifest(
                model=plan.checkpoint.name,
                target=plan.target.name,
                vision=vision.files.graphs,
                shared=vision.files.shared,
                preprocessing=plan.checkpoint.preprocessing,
                tiles=plan.tiles,
                text=language.text,
                prompt=language.prompt,
                language_models=language.models,
                versions={"foveate": __version__} | {tool: version(tool) for tool in _TOOLS},
                calibration_digest=vision.made.set_digest if vision.made is not None else None,
            )
        )
        progress("Hashing and publishing", steps.behind)
    progress("Done", 1.0)
    files = sorted(file for file in options.out.rglob("*") if file.is_file())
    sizes = {file.relative_to(options.out).as_posix(): file.stat().st_size for file in files}
    notes = (*_notes_of(plan, options), *notes_of_clips(plan.checkpoint, language.prompt))
    notes += language.notes
    total = round(time.perf_counter() - begun, 2)
    return BuildReport(options.out, sizes, steps.seconds, total, notes, vision.made, frames)


def _notes_of(plan: BuildPlan, options: BuildOptions) -> list[str]:
    if options.opset is None and plan.opset != USUAL_OPSET:
        return [
            f"opset {plan.opset} instead of {USUAL_OPSET}: the first in which ONNX "
            "quantizes float16."
        ]
    return []


def _expected_seconds(plan: BuildPlan, options: BuildOptions) -> dict[str, float]:
    """Return about how long each step takes, so that the whole moves evenly."""
    predicted = {step.name: step.seconds for step in plan.cost.steps}
    graphs = {
        f"vision_{reducer.token_count(plan.patches)}": predicted["vision"] / len(plan.reducers)
        for reducer in plan.reducers
    }
    decoders = sum(predicted[f"decoder_{backend}"] for backend in options.decoders.backends)
    calibrating = {"int8": predicted["int8"]} if "int8" in predicted else {}
    if options.int8.frames is not None:
        calibrating["frames"] = _READING_S
    publishing = {"publishing": predicted["publishing"]}
    return graphs | calibrating | {"language_model": decoders + predicted["text"]} | publishing
