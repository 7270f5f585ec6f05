"""Export the vision graphs of a bundle, in the precision of the plan.

FP32 and FP16 graphs are written as they are traced. For INT8 the graphs are first written in FP32
to a folder of their own, and `calibration.int8.graphs` makes the bundle's graphs from them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from calibration.frames.dataset import CalibrationSet
from calibration.int8.graphs import Int8Graphs, Int8Task, make_int8_graphs
from calibration.int8.resume import ResumeFolder
from engines.bundle import BundleDraft
from engines.manifest import Precision, ReducerSpec, VisionGraph
from engines.progress_bar import Progress
from export.build.plan import BuildOptions, BuildPlan
from export.checkpoint.accuracy_table import AccuracyTable
from export.kept_parts import KeptParts
from export.reducers import Reducer
from export.vision.to_onnx import trace_graph
from export.vision.vision_module import build_vision_module
from graphs.float16 import convert_to_fp16
from graphs.graph_file import write_graph
from graphs.operator_check import check_graph, oldest_tensorrt
from graphs.shared_weights import SharedWeights

_PART = "vision"
"""What `KeptParts` calls the graphs."""


class Step(Protocol):
    """How a build tells what it is doing."""

    def __call__(self, name: str, line: str) -> AbstractContextManager[Progress]:
        """Begin a step and give it somewhere to tell its own progress."""


@dataclass(frozen=True)
class Vision:
    """What was written.

    Attributes:
        graphs: as the manifest describes them.
        made: how INT8 came about; None for other precisions.
    """

    graphs: tuple[VisionGraph, ...]
    made: Int8Graphs | None = None


def export_vision(
    plan: BuildPlan,
    options: BuildOptions,
    frames: CalibrationSet | None,
    draft: BundleDraft,
    kept: KeptParts,
    step: Step,
) -> Vision:
    """Write the vision graphs.

    Args:
        plan: from `plan_build`.
        options: what it was made from.
        frames: to calibrate with, for INT8.
        draft: the bundle that is being written.
        kept: graphs of a build that did not come to its end.
        step: called for each graph.

    Raises:
        GateError: INT8 agrees too little with FP32.
        FoveateError: a graph cannot be had in this precision.
    """
    if plan.precision in ("fp32", "fp16"):
        return Vision(_export_graphs(plan, plan.precision, draft.root, kept, step))
    # Inside the draft, so that it goes with it should the process be killed.
    with TemporaryDirectory(dir=draft.root, prefix=".fp32-") as name:
        folder = Path(name)
        exact = _export_graphs(plan, "fp32", folder, kept, step)
        task = Int8Task(
            sources={graph.file: folder / graph.file for graph in exact},
            root=draft.root,
            precision=plan.precision,
            tensorrt=oldest_tensorrt(plan.target),
            options=options.int8,
            frames=frames,
            record=plan.record,
            unfinished=ResumeFolder(options.out),
        )
        with step("int8", "INT8") as progress:
            made = make_int8_graphs(task, progress)
    return Vision(tuple(made.describe(graph, plan.precision) for graph in exact), made)


def _export_graphs(
    plan: BuildPlan, precision: Precision, root: Path, kept: KeptParts, step: Step
) -> tuple[VisionGraph, ...]:
    made_with = {
        "precision": [precision, plan.precision],
        "reducers": [(one.name, dict(one.options)) for one in plan.reducers],
        "opset": plan.opset,
        "target": plan.target.name,
    }
    found = kept.restore(_PART, made_with, root)
    if found is not None:
        return tuple(map(VisionGraph.model_validate, found))
    several = len(plan.reducers) > 1
    shared = SharedWeights(root / "vision/weights.data") if several else None
    graphs = []
    for reducer in plan.reducers:
        count = reducer.token_count(plan.patches)
        line = f"Vision graph: {reducer.name}, {count} of {plan.patches} visual tokens"
        with step(f"vision_{count}", line):
            graphs.append(_export_graph(plan, reducer, precision, root, shared))
    files = {name for graph in graphs for name in (graph.file, graph.weights) if name}
    said = [graph.model_dump(mode="json") for graph in graphs]
    again = precision != plan.precision  # INT8 is made of these
    kept.keep(_PART, made_with, root, sorted(files), said, linked=not again)
    return tuple(graphs)


def _export_graph(
    plan: BuildPlan,
    reducer: Reducer,
    precision: Precision,
    root: Path,
    shared: SharedWeights | None,
) -> VisionGraph:
    count = reducer.token_count(plan.patches)
    accuracy = AccuracyTable(plan.checkpoint.root)
    relative = f"vision/{reducer.name}_{count}.onnx"
    model = trace_graph(build_vision_module(plan.checkpoint, reducer))
    model.metadata_props["model"] = plan.checkpoint.name
    if precision == "fp16":
        convert_to_fp16(model)
    exported = write_graph(model, root / relative, opset=plan.opset, shared=shared)
    if (tensorrt := oldest_tensorrt(plan.target)) is not None:
        check_graph(exported.file, tensorrt)
    return VisionGraph(
        file=relative,
        weights=f"vision/{exported.weights_file.name}" if exported.weights_file else None,
        inputs=exported.inputs,
        outputs=exported.outputs,
        reducer=ReducerSpec(name=reducer.name, tokens=count, options=dict(reducer.options)),
        precision=precision,
        opset=exported.opset,
        patch_rows=plan.checkpoint.patch_side,
        patch_columns=plan.checkpoint.patch_side,
        # Of what it will be: a graph that INT8 is made of is described before it is.
        accuracy=accuracy.accuracy_of(reducer, plan.patches, plan.precision),
    )
