"""Write an INT8 bundle from a float32 bundle and the user's frames, without PyTorch.

The new bundle holds INT8 vision graphs and the calibration they were made with. Everything else is
hard-linked from the old bundle where the disk allows it, and copied where not.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from calibration.frames.dataset import CalibrationSet, collect_frames
from calibration.int8.graphs import Int8Graphs, Int8Task, make_int8_graphs
from calibration.int8.options import Int8Options
from calibration.int8.resume import ResumeFolder
from engines import __version__
from engines.bundle import Bundle, BundleDraft, refuse_occupied, write_bundle
from engines.errors import OptionError
from engines.frame_size import frame_size_of
from engines.manifest import SCHEMA_VERSION, Precision, Preprocessing
from engines.progress_bar import Progress
from engines.targets import find_target
from engines.trt.batch_profile import usual_batch
from engines.trt.on_device import PAGE_NAME, SCRIPT_NAME, write_device_files
from graphs.operator_check import oldest_tensorrt
from runtime.vision.layouts import Layout, layout_from
from runtime.vision.parallel_resize import ALONE

_log = logging.getLogger(__name__)

_REWRITTEN = {"README.md", SCRIPT_NAME, PAGE_NAME}
_TOOLS = ("onnx", "onnxruntime")


@dataclass(frozen=True)
class Int8Bundle:
    """What was made.

    Attributes:
        bundle: its directory.
        made: its graphs.
        frames: what they were made from.
    """

    bundle: Path
    made: Int8Graphs
    frames: CalibrationSet | None


def calibrate_bundle(
    bundle: Bundle,
    out: Path,
    options: Int8Options,
    *,
    precision: Precision = "int8",
    overwrite: bool = False,
    targets_file: Path | None = None,
    progress: Progress = lambda line, done: None,
) -> Int8Bundle:
    """Make an INT8 bundle from a float32 one.

    Args:
        bundle: from `open_bundle`.
        out: where the new one is to be.
        options: frames, method, gate.
        precision: ``int8`` or ``mixed``.
        overwrite: replace a bundle that is there.
        targets_file: TOML file of the user's own targets.
        progress: called for every frame.

    Raises:
        GateError: the result agrees too little with FP32; nothing is written.
        FoveateError: options, frames or bundle cannot be used.
    """
    record = options.check(precision)
    target = find_target(bundle.manifest.target, targets_file)
    target.check_precision(precision)
    _refuse_what_cannot_be_calibrated(bundle)
    if out.resolve() == bundle.root.resolve():
        raise OptionError(f"--out {out} is the bundle itself. Give another directory.")
    refuse_occupied(out, overwrite)
    patch_pixels = bundle.preprocessing.height // bundle.vision().patch_rows
    patches = bundle.vision().patch_rows, bundle.vision().patch_columns
    layout = layout_from(bundle.preprocessing, bundle.manifest.tiles, patches)
    frames = collect(options, bundle.preprocessing, layout, patch_pixels, progress)
    unfinished = ResumeFolder(out)
    with unfinished.kept(), write_bundle(out, overwrite=overwrite) as draft:
        task = Int8Task(
            source_root=bundle.root,
            files=bundle.manifest.vision_files,
            root=draft.root,
            precision=precision,
            tensorrt=oldest_tensorrt(target),
            options=options,
            frames=frames,
            record=record,
            unfinished=unfinished,
        )
        made = make_int8_graphs(task, progress)
        files = made.describe(bundle.manifest.vision_files, precision)
        _copy_rest(bundle, draft)
        write_device_files(draft.root, files, target, usual_batch(bundle.most_squares))
        versions = {"foveate": __version__} | {tool: version(tool) for tool in _TOOLS}
        draft.describe(
            bundle.manifest.model_copy(
                update={
                    "vision": files.graphs,
                    "shared": files.shared,
                    "calibration_digest": made.set_digest,
                    "schema_version": SCHEMA_VERSION,
                    "versions": {**bundle.manifest.versions, **versions},
                    "files": {},
                }
            )
        )
        progress("Hashing and publishing", 1.0)
    return Int8Bundle(out, made, frames)


def collect(
    options: Int8Options,
    preprocessing: Preprocessing,
    layout: Layout,
    patch_pixels: int,
    progress: Progress,
) -> CalibrationSet | None:
    """Collect the frames that the options ask for; None where they ask for none.

    What they lack is logged at once: whoever waits for the calibration may want to stop it.

    Args:
        options: which frames.
        preprocessing: of the bundle.
        layout: cuts a frame into squares.
        patch_pixels: pixels along a patch.
        progress: called for every frame.

    Raises:
        SourceError: as `collect_frames`.
    """
    if options.frames is None:
        return None
    frames = collect_frames(
        options.frames,
        preprocessing,
        replace(options.choice, patch_pixels=patch_pixels),
        lambda read, kept: progress(f"Reading frames: {read:,} read, {kept} kept", 0.0),
        cut=lambda picture: layout.squares(picture, ALONE),
    )
    frames.split()  # refuses too few before anything slow
    for warning in frames.coverage.warnings:
        _log.warning("%s: %s", frames.source, warning)
    return frames


def _refuse_what_cannot_be_calibrated(bundle: Bundle) -> None:
    rounded = [graph for graph in bundle.manifest.vision if graph.precision != "fp32"]
    if rounded:
        raise OptionError(
            f"{bundle.root}: {rounded[0].file} is {rounded[0].precision}, and calibration starts "
            "from fp32. Build the bundle with --precision fp32 and calibrate that one; for a "
            "TensorRT device what is not quantized becomes fp16 by itself."
        )
    if frame_size_of(bundle.manifest.vision_files.files[0]) is not None:
        raise OptionError(
            f"{bundle.root} takes camera frames, and calibration starts from a graph that takes "
            "pixels. Build both at once: python -m export.build --precision int8 --input uint8."
        )


def _copy_rest(bundle: Bundle, draft: BundleDraft) -> None:
    """Link or copy what does not change: the language model, the tokenizer, the embeddings."""
    files = bundle.manifest.vision_files.files
    replaced = {name for graph in files for name in (graph.file, graph.weights) if name}
    for name in bundle.manifest.files:
        if name in replaced or name in _REWRITTEN:
            continue
        try:
            os.link(bundle.path(name), draft.path(name))
        except OSError:  # another disk, or one without links
            shutil.copy2(bundle.path(name), draft.path(name))
