"""Quantize the vision graphs of a bundle to INT8 or FP8, and keep them only if they pass the gate.

One calibration serves the graphs of all budgets. Q/DQ stand in the tower, and for TensorRT the rest
is float16. Search, gate and report each have frames of their own; the gate and the report are
measured on the files that will be published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir

from calibration.agreement.graphs import compare_budgets, rank_stages
from calibration.agreement.measured import MeasuredAgreement, measure_agreement
from calibration.agreement.token_metrics import Agreement, Gate, average_agreement
from calibration.frames.dataset import CalibrationSet, FrameSets
from calibration.int8.options import Int8Options
from calibration.int8.resume import ResumeFolder
from calibration.scales.apply import apply_calibration
from calibration.scales.calibrate import calibrate
from calibration.scales.calibration_file import Calibration
from calibration.scales.number_format import FP8, INT8, INT8_IN_HALF, NumberFormat
from calibration.sensitivity.report import svg_from_report
from calibration.sensitivity.search import SensitivityReport, search_exclusions
from engines.errors import GateError
from engines.manifest import Graph, Precision, SharedGraphs, VisionFiles
from engines.progress_bar import Progress
from graphs.float16 import convert_to_fp16
from graphs.graph_file import HALF_OPSET, ExportedGraph, set_opset, write_graph
from graphs.operator_check import check_graph

RECORD_NAME = "vision/calibration.json"
"""Where a bundle keeps what its INT8 graphs were made with."""

AnyGraph = TypeVar("AnyGraph", bound=Graph)

_SET_NOTE = "calibration_set_sha256"
_FIRST = ", first "
_SUSPECTS = 5
_SUSPECT_FRAMES = 2


@dataclass(frozen=True)
class Int8Graphs:
    """The INT8 or FP8 graphs of a bundle.

    Attributes:
        form: what their layers are.
        attentions: how many of a tower's attentions have both products in it.
        written: each file by its place in the bundle.
        calibration: what they were made with.
        agreements: with FP32 on the gate's frames, by graph, and of its smaller budgets; empty
            where there were no frames.
        held_out: how many frames that were.
        reports: with FP32 on frames that nothing was decided on, by graph.
        searches: what `--precision mixed` or ``fp8`` found, by graph.
    """

    form: NumberFormat
    attentions: int
    written: Mapping[str, ExportedGraph]
    calibration: Calibration
    agreements: Mapping[str, Agreement]
    held_out: int
    reports: Mapping[str, MeasuredAgreement]
    searches: Mapping[str, SensitivityReport]

    def describe(self, files: VisionFiles, precision: Precision) -> VisionFiles:
        """Return what a manifest says of graphs that were float32 before."""
        update = partial(self._describe, precision=precision)
        shared = files.shared
        if shared is not None:
            shared = SharedGraphs(tower=update(shared.tower), projector=update(shared.projector))
        return VisionFiles(graphs=tuple(map(update, files.graphs)), shared=shared)

    def _describe(self, graph: AnyGraph, *, precision: Precision) -> AnyGraph:
        exported = self.written[graph.file]
        weights = exported.weights_file
        return graph.model_copy(
            update={
                "precision": precision,
                "opset": exported.opset,
                "weights": f"vision/{weights.name}" if weights is not None else None,
            }
        )

    @property
    def set_digest(self) -> str:
        """SHA-256 of the frames, for the bundle's manifest."""
        return self.calibration.notes.get(_SET_NOTE, self.calibration.frames.sha256)


@dataclass(frozen=True)
class Int8Task:
    """What to calibrate and quantize.

    Attributes:
        source_root: where the float32 files lie, at their places in the bundle.
        files: what they are.
        root: the bundle's (staging) directory.
        precision: ``int8``, or ``mixed`` (INT8) or ``fp8`` to give layers back to floating point
            until the gate holds.
        tensorrt: the oldest version that is to take the graphs; what is not quantized then becomes
            float16. None: it stays float32, as CPUs want it.
        options: as the user gave them.
        frames: the user's; None only with a record.
        record: a calibration to be used again.
        unfinished: where to keep what was measured so far; None keeps nothing.
    """

    source_root: Path
    files: VisionFiles
    root: Path
    precision: Precision
    tensorrt: str | None
    options: Int8Options
    frames: CalibrationSet | None
    record: Calibration | None = None
    unfinished: ResumeFolder | None = None

    @property
    def gate(self) -> Gate:
        """The least agreement that is good enough."""
        return self.options.gate_for(self.precision)

    @property
    def form(self) -> NumberFormat:
        """What the layers become."""
        if self.precision == "fp8":
            return FP8
        return INT8 if self.tensorrt is None else INT8_IN_HALF

    @property
    def budgets(self) -> Mapping[str, tuple[str, ...]]:
        """The files that run one after the other, by the vision graph's own."""
        return {
            graph.file: tuple(stage.file for stage in self.files.stages(graph))
            for graph in self.files.graphs
        }

    def sources(self, name: str) -> tuple[Path, ...]:
        """Return the float32 files of a vision graph."""
        return tuple(self.source_root / file for file in self.budgets[name])

    def made(self, name: str) -> tuple[Path, ...]:
        """Return its INT8 files."""
        return tuple(self.root / file for file in self.budgets[name])


def make_int8_graphs(task: Int8Task, progress: Progress = lambda line, done: None) -> Int8Graphs:
    """Calibrate and quantize the graphs, write them and check them.

    Raises:
        GateError: the graphs agree too little with FP32; the worst layers are named.
        CalibrationError: the frames, the graphs or the record do not go together.
        EngineError: TensorRT will not take a graph.
    """
    sets = task.frames.split() if task.frames is not None else None
    calibration = task.record
    searches: dict[str, SensitivityReport] = {}
    if calibration is None:
        if sets is None:
            raise RuntimeError("neither frames nor a record; Int8Options.check refuses that")
        calibration = _calibrate(task, sets.calibration, _part(progress, 0.0, 0.5))
        if task.precision != "int8":
            part = _part(progress, 0.5, 0.8)
            calibration, searches = _search(task, calibration, sets, part)
    written, attentions = _write_graphs(task, calibration, _part(progress, 0.8, 0.85))
    agreements: dict[str, Agreement] = {}
    reports: dict[str, MeasuredAgreement] = {}
    if sets is not None:
        agreements, reports = _judge(task, sets, _part(progress, 0.85, 1.0))
        _refuse_below_gate(task, agreements, sets.gate)
        calibration = calibration.model_copy(update={"agreement": reports})
    calibration.save(task.root / RECORD_NAME)
    for name, search in searches.items():
        if search.sites:
            chart = (task.root / name).with_suffix(".sensitivity.svg")
            chart.write_text(svg_from_report(search), encoding="utf-8")
    held_out = len(sets.gate.frames) if sets is not None else 0
    return Int8Graphs(
        task.form, attentions, written, calibration, agreements, held_out, reports, searches
    )


def _calibrate(task: Int8Task, frames: CalibrationSet, progress: Progress) -> Calibration:
    first = task.source_root / task.files.files[0].file
    resume = task.unfinished.sums if task.unfinished is not None else None
    found = calibrate(first, frames, task.options.how, progress=progress, resume=resume)
    whole = task.frames.digest if task.frames is not None else found.frames.sha256
    return found.model_copy(update={"notes": {**found.notes, _SET_NOTE: whole}})


def _search(
    task: Int8Task, calibration: Calibration, sets: FrameSets, progress: Progress
) -> tuple[Calibration, dict[str, SensitivityReport]]:
    """Meet the gate on one graph after the other; what one excludes stays excluded."""
    reports = {}
    for name in task.budgets:
        reports[name] = search_exclusions(
            task.sources(name),
            calibration,
            sets.search,
            task.gate,
            also_on=sets.gate,
            threads=task.options.how.threads,
            progress=progress,
            resume=task.unfinished.trials if task.unfinished is not None else None,
            form=FP8 if task.form is FP8 else INT8,
        )
        calibration = reports[name].calibration
    return calibration, reports


def _write_graphs(
    task: Int8Task, calibration: Calibration, progress: Progress
) -> tuple[dict[str, ExportedGraph], int]:
    """Return the files by their names, and how many attentions of the tower are quantized."""
    files, written, attentions = task.files.files, {}, 0
    for at, name in enumerate(graph.file for graph in files):
        progress(f"Quantizing {name}", at / len(files))
        model = ir.load(task.source_root / name)
        if at == 0 or task.files.shared is None:  # the tower is in it
            attentions = apply_calibration(model, calibration, task.form)
        opset = model.opset_imports[""]
        if task.tensorrt is not None:
            opset = max(opset, HALF_OPSET)
            set_opset(model, opset)
            convert_to_fp16(model)
        exported = write_graph(model, task.root / name, opset=opset)
        if task.tensorrt is not None:
            check_graph(exported.file, task.tensorrt)
        written[name] = exported
    return written, attentions


def _told_budget(name: str, count: int, counts: Sequence[int]) -> str:
    """Return what a budget is called: its file, and how many of its tokens if not all."""
    return name if count == max(counts) else f"{name}{_FIRST}{count}"


def _judge(
    task: Int8Task, sets: FrameSets, progress: Progress
) -> tuple[dict[str, Agreement], dict[str, MeasuredAgreement]]:
    """Return how far each budget agrees with FP32 on the gate's frames and on the report's."""
    agreements, reports = {}, {}
    judged = replace(sets.gate, frames=sets.gate.frames + sets.report.frames)
    for at, name in enumerate(task.budgets):
        part = _part(progress, at / len(task.budgets), (at + 1) / len(task.budgets))
        counts = [one.reducer.tokens for one in task.files.graphs if one.file == name]
        sides = task.sources(name), task.made(name)
        found = compare_budgets(*sides, judged, counts, task.options.how.threads, part)
        for count, pictures in found.items():
            told = _told_budget(name, count, counts)
            agreements[told] = average_agreement(pictures[: len(sets.gate)])
            reports[told] = measure_agreement(pictures[len(sets.gate) :], sets.report.counts)
    return agreements, reports


def _refuse_below_gate(
    task: Int8Task, agreements: Mapping[str, Agreement], held_out: CalibrationSet
) -> None:
    gate = task.gate
    missed = {name: one for name, one in agreements.items() if not gate.holds(one)}
    if not missed:
        return
    told = "; ".join(
        f"{name} keeps {one.overlap:.1%} of the patches ({one.worst:.1%} on the worst picture), "
        f"merges {one.assignment:.1%} of the others alike, and its tokens have a cosine of "
        f"{one.cosine:.4f}"
        for name, one in missed.items()
    )
    name = next(iter(missed)).split(_FIRST)[0]
    few = islice(held_out, _SUSPECT_FRAMES)
    worst = rank_stages(task.sources(name), task.made(name), few, task.options.how.threads)
    layers = ", ".join(f"{one.stage} ({one.growth:+.1%})" for one in worst[:_SUSPECTS])
    advice = (
        "--precision mixed leaves such layers in floating point until the gate holds; more and "
        "more varied frames, or another --method, may help too."
        if task.precision == "int8"
        else "Calibrate on frames that are more like these, or lower the gate."
    )
    form = task.form.name.upper()
    raise GateError(
        f"{form} misses the gate of {gate.describe()} on {held_out.describe()} held out: {told}. "
        f"What adds most to the error in {name}: {layers}. Nothing was written. {advice}"
    )


def _part(progress: Progress, begin: float, end: float) -> Progress:
    def tell(line: str, done: float) -> None:
        progress(line, begin + done * (end - begin))

    return tell
