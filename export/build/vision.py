"""Export the vision graphs of a bundle, in the precision of the plan.

One graph is written whole. Where several are needed, the tower and the projector are written once
and each has a file for its reducer; budgets of a reducer that ranks need one graph together.
FP32 and FP16 graphs are written as they are traced. For INT8 the graphs are first written in FP32
to a folder of their own, and `calibration.int8.graphs` makes the bundle's graphs from them. What
they take and return otherwise comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import onnx_ir as ir

from calibration.frames.dataset import CalibrationSet
from calibration.int8.graphs import Int8Graphs, Int8Task, make_int8_graphs
from calibration.int8.resume import ResumeFolder
from engines.bundle import BundleDraft
from engines.manifest import (
    QUANTIZED_PRECISIONS,
    Graph,
    Precision,
    ReducerSpec,
    SharedGraphs,
    VisionFiles,
    VisionGraph,
)
from engines.progress_bar import Progress
from export.build.graph_ends import change_ends
from export.build.plan import BuildOptions, BuildPlan
from export.checkpoint.accuracy_table import AccuracyTable
from export.kept_parts import KeptParts
from export.reducers import Reducer
from export.vision.parts import build_parts
from export.vision.to_onnx import trace_graph
from export.vision.vision_module import build_vision_module
from graphs.float16 import convert_to_fp16
from graphs.graph_file import write_graph
from graphs.operator_check import check_graph, oldest_tensorrt

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
        files: as the manifest describes them.
        made: how INT8 came about; None for other precisions.
    """

    files: VisionFiles
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
    vision = _export_floats(plan, options, frames, draft, kept, step)
    return replace(vision, files=change_ends(vision.files, plan, options, draft.root))


def _export_floats(
    plan: BuildPlan,
    options: BuildOptions,
    frames: CalibrationSet | None,
    draft: BundleDraft,
    kept: KeptParts,
    step: Step,
) -> Vision:
    """Write the vision graphs, which take pixels and return float32 tokens."""
    if plan.precision not in QUANTIZED_PRECISIONS:
        return Vision(_export_graphs(plan, plan.precision, draft.root, kept, step))
    # Inside the draft, so that it goes with it should the process be killed.
    with TemporaryDirectory(dir=draft.root, prefix=".fp32-") as name:
        folder = Path(name)
        exact = _export_graphs(plan, "fp32", folder, kept, step)
        task = Int8Task(
            source_root=folder,
            files=exact,
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
    return Vision(made.describe(exact, plan.precision), made)


def _export_graphs(
    plan: BuildPlan, precision: Precision, root: Path, kept: KeptParts, step: Step
) -> VisionFiles:
    made_with = {
        "precision": [precision, plan.precision],
        "reducers": [(one.name, dict(one.options)) for one in plan.reducers],
        "opset": plan.opset,
        "target": plan.target.name,
        "tells_worth": plan.shares_budget,
    }
    found = kept.restore(_PART, made_with, root)
    if found is not None:
        return VisionFiles.model_validate(found)
    writer = _Writer(plan, precision, root)
    largest = {_largest(one, plan.reducers): None for one in plan.reducers}
    made = _export_parts if len(largest) > 1 else _export_whole
    shared, graphs = made(plan, writer, list(largest), step)
    files = VisionFiles(
        graphs=tuple(
            _describe(plan, one, graphs[_largest(one, plan.reducers)]) for one in plan.reducers
        ),
        shared=shared,
    )
    names = {name for one in files.files for name in (one.file, one.weights) if name}
    again = precision != plan.precision  # INT8 is made of these
    said = files.model_dump(mode="json")
    kept.keep(_PART, made_with, root, sorted(names), said, linked=not again)
    return files


def _largest(reducer: Reducer, reducers: Sequence[Reducer]) -> Reducer:
    """Return the reducer whose graph serves this one, most often itself."""
    able = [one for one in reducers if one.serves(reducer)]
    return max(able, key=lambda one: one.options["budget"], default=reducer)


def _export_whole(
    plan: BuildPlan, writer: _Writer, reducers: Sequence[Reducer], step: Step
) -> tuple[None, dict[Reducer, Graph]]:
    """Write the one graph there is, from pixels to visual tokens."""
    (reducer,) = reducers
    count = reducer.token_count(plan.patches)
    with step(f"vision_{count}", _told(reducer, plan)):
        module = build_vision_module(plan.checkpoint, reducer, plan.shares_budget)
        model = trace_graph(module)
        return None, {reducer: writer.write(model, _file_of(reducer, plan))}


def _export_parts(
    plan: BuildPlan, writer: _Writer, reducers: Sequence[Reducer], step: Step
) -> tuple[SharedGraphs, dict[Reducer, Graph]]:
    """Write the tower and the projector once, and a graph for each reducer."""
    parts = build_parts(plan.checkpoint, reducers)
    with step("vision_shared", "Vision graph: the tower and the projector of all budgets"):
        shared = SharedGraphs(
            tower=writer.write(parts.trace_tower(), "vision/tower.onnx"),
            projector=writer.write(parts.trace_projector(), "vision/projector.onnx"),
        )
    graphs = {}
    for reducer in reducers:
        with step(f"vision_{reducer.token_count(plan.patches)}", _told(reducer, plan)):
            graphs[reducer] = writer.write(parts.trace_reducer(reducer), _file_of(reducer, plan))
    return shared, graphs


def _told(reducer: Reducer, plan: BuildPlan) -> str:
    count = reducer.token_count(plan.patches)
    return f"Vision graph: {reducer.name}, {count} of {plan.patches} visual tokens"


def _file_of(reducer: Reducer, plan: BuildPlan) -> str:
    return f"vision/{reducer.name}_{reducer.token_count(plan.patches)}.onnx"


@dataclass(frozen=True)
class _Writer:
    """Writes float32 models in the precision that is wanted."""

    plan: BuildPlan
    precision: Precision
    root: Path

    def write(self, model: ir.Model, relative: str) -> Graph:
        """Write one and describe it."""
        model.metadata_props["model"] = self.plan.checkpoint.name
        if self.precision == "fp16":
            convert_to_fp16(model)
        exported = write_graph(model, self.root / relative, opset=self.plan.opset)
        if (tensorrt := oldest_tensorrt(self.plan.target)) is not None:
            check_graph(exported.file, tensorrt)
        return Graph(
            file=relative,
            weights=f"vision/{exported.weights_file.name}" if exported.weights_file else None,
            inputs=exported.inputs,
            outputs=exported.outputs,
            precision=self.precision,
            opset=exported.opset,
        )


def _describe(plan: BuildPlan, reducer: Reducer, graph: Graph) -> VisionGraph:
    """Describe one budget; its file may be that of a larger one."""
    count = reducer.token_count(plan.patches)
    return VisionGraph(
        **dict(graph),
        reducer=ReducerSpec(name=reducer.name, tokens=count, options=dict(reducer.options)),
        patch_rows=plan.checkpoint.patch_side,
        patch_columns=plan.checkpoint.patch_side,
        # Of what it will be: a graph that INT8 is made of is described before it is. Where squares
        # share a budget, it depends on more than what one of them leaves.
        accuracy=None
        if plan.shares_budget
        else AccuracyTable(plan.checkpoint.root).accuracy_of(reducer, plan.patches, plan.precision),
    )
