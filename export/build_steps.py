"""A checkpoint becomes a bundle, step by step.

Enters: `BuildOptions`. Leaves: a bundle directory, whole or not at all, and a `BuildReport`. The
steps are plan, export the vision graph of each budget, export the language model, publish.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from calibration.graph_check import OLDEST_TENSORRT, check_graph
from calibration.graph_file import write_graph
from calibration.half_precision import convert_to_fp16
from calibration.shared_weights import SharedWeights
from engines import __version__
from engines.bundle import BundleDraft, write_bundle
from engines.manifest import Manifest, ReducerSpec, VisionGraph
from engines.progress_bar import Progress
from engines.trt.on_device import write_device_files
from export.accuracy_table import AccuracyTable
from export.build_plan import BuildOptions, BuildPlan, plan_build
from export.language_models import export_language_models
from export.reducers import Reducer
from export.to_onnx import trace_graph
from export.visual_graph import build_visual_graph

_TOOLS = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")


@dataclass(frozen=True)
class BuildReport:
    """What was built.

    Attributes:
        bundle: its directory.
        bytes: size of each file in it.
        seconds: how long each step took.
        notes: what did not come out as asked for, in words.
    """

    bundle: Path
    bytes: dict[str, int]
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()


def build_bundle(
    options: BuildOptions, progress: Progress = lambda line, done: None
) -> BuildReport:
    """Build a bundle.

    Raises:
        FoveateError: the options, the checkpoint or the disk do not allow it; nothing is left.
    """
    progress(f"Opening {options.model}", 0.0)
    plan = plan_build(options)
    steps = len(plan.reducers) + 2
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str, line: str) -> Iterator[None]:
        progress(line, len(seconds) / steps)
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 2)

    with write_bundle(options.out, overwrite=options.overwrite) as draft:
        graphs = []
        several = len(plan.reducers) > 1
        shared = SharedWeights(draft.path("vision/weights.data")) if several else None
        for reducer in plan.reducers:
            count = reducer.token_count(plan.patches)
            line = f"Vision graph: {reducer.name}, {count} of {plan.patches} visual tokens"
            with step(f"vision_{count}", line):
                graphs.append(_export_graph(plan, reducer, options.opset, draft, shared))
        with step("language_model", f"Language model for {', '.join(options.decoders.backends)}"):
            begun = len(seconds)
            language = export_language_models(
                plan.checkpoint,
                draft.root,
                options.decoders,
                progress=lambda done, layers: progress(
                    f"Language model: layer {done} of {layers}", (begun + done / layers) / steps
                ),
            )
        write_device_files(draft.root, graphs[0], plan.target)
        draft.describe(
            Manifest(
                model=plan.checkpoint.name,
                target=plan.target.name,
                vision=tuple(graphs),
                preprocessing=plan.checkpoint.preprocessing,
                text=language.text,
                prompt=language.prompt,
                language_models=language.models,
                versions={"foveate": __version__} | {tool: version(tool) for tool in _TOOLS},
            )
        )
        progress("Hashing and publishing", len(seconds) / steps)
    progress("Done", 1.0)
    files = sorted(file for file in options.out.rglob("*") if file.is_file())
    sizes = {file.relative_to(options.out).as_posix(): file.stat().st_size for file in files}
    return BuildReport(options.out, sizes, seconds, language.notes)


def _export_graph(
    plan: BuildPlan,
    reducer: Reducer,
    opset: int,
    draft: BundleDraft,
    shared: SharedWeights | None,
) -> VisionGraph:
    count = reducer.token_count(plan.patches)
    accuracy = AccuracyTable(plan.checkpoint.root)
    relative = f"vision/{reducer.name}_{count}.onnx"
    model = trace_graph(build_visual_graph(plan.checkpoint, reducer))
    model.metadata_props["model"] = plan.checkpoint.name
    if plan.precision == "fp16":
        convert_to_fp16(model)
    exported = write_graph(model, draft.path(relative), opset=opset, shared=shared)
    if plan.target.needs_cuda:
        # TensorRT takes from version to version more, so the oldest speaks for all.
        oldest = plan.target.tensorrt_min if plan.target.engine == "tensorrt" else None
        check_graph(exported.file, oldest or OLDEST_TENSORRT)
    return VisionGraph(
        file=relative,
        weights=f"vision/{exported.weights_file.name}" if exported.weights_file else None,
        inputs=exported.inputs,
        outputs=exported.outputs,
        reducer=ReducerSpec(name=reducer.name, tokens=count, options=dict(reducer.options)),
        precision=plan.precision,
        opset=exported.opset,
        patch_rows=plan.checkpoint.patch_side,
        patch_columns=plan.checkpoint.patch_side,
        accuracy=accuracy.accuracy_of(reducer, plan.patches, plan.precision),
    )
