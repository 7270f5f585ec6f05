"""What FP16, INT8 and mixed keep of the patches that FP32 keeps, of a checkpoint with tiles.

The tower is calibrated on squares of one folder of pictures and judged on those of another, reducer
by reducer, in ONNX Runtime. The layers that `mixed` leaves in floating point are searched with
VisionZip at 64 of each square, on pictures of the first folder.

    python -m benchmarks.square_precision --model CHECKPOINT --frames DIR --held-out DIR --json

`--keep tower.layers.5.attention` adds INT8 with these layers in floating point (several, with
commas between them; `each` does so for one encoder layer after the other).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import onnx_ir as ir
import typer

from calibration.agreement.graphs import tokens_of
from calibration.agreement.measured import Measure, MeasuredAgreement, measure_agreement
from calibration.agreement.token_metrics import Gate, compare_visual_tokens
from calibration.frames.dataset import CalibrationSet, FrameOptions, collect_frames
from calibration.scales.apply import apply_calibration
from calibration.scales.calibrate import CalibrationOptions, calibrate
from calibration.scales.calibration_file import Calibration
from calibration.sensitivity.search import search_exclusions
from engines.errors import GateError
from engines.ort import OrtSession
from engines.session import Array
from export.build.tiles import tiles_of
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.reducers import Reducer, reducer_for_budget
from export.vision.parts import REDUCED, build_parts
from graphs.float16 import convert_to_fp16
from graphs.graph_file import write_graph
from graphs.modules import is_inside
from runtime.vision import VisualTokens
from runtime.vision.layouts import layout_from
from runtime.vision.parallel_resize import ALONE

KINDS = ("visionzip", "top_attention", "scope", "divprune")
BUDGETS = (64, 16)
SEARCHED = "visionzip_64"

app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="A checkpoint that cuts pictures into tiles.")],
    frames: Annotated[Path, typer.Option(help="Pictures to calibrate and search on.")],
    held_out: Annotated[Path, typer.Option(help="Other pictures, to judge by.")],
    keep: Annotated[str, typer.Option(help="More INT8, with these in floating point.")] = "",
    search: Annotated[
        bool, typer.Option(help="Search what mixed leaves in floating point.")
    ] = True,
    threads: Annotated[int | None, typer.Option()] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Calibrate once, then compare every precision with FP32, reducer by reducer."""
    checkpoint = open_checkpoint(str(model))
    given, judged = _squares(checkpoint, frames), _squares(checkpoint, held_out)
    sets = given.split()
    with TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), checkpoint, judged, threads)
        options = CalibrationOptions(threads=threads)
        found = calibrate(bench.tower, sets.calibration, options, progress=_tell)
        ways = {"int8": found} | dict(_keeping(found, keep))
        told: dict[str, Any] = {}
        if search:
            ways["mixed"], told = _search(bench, found, sets.search, sets.gate)
        exact = bench.run_tower(None)
        results = {"fp16": bench.compare(exact, bench.run_tower("fp16"))}
        for name, calibration in ways.items():
            results[name] = bench.compare(exact, bench.run_tower(calibration))
    document = {
        "calibrated_on": sets.calibration.describe(),
        "judged_on": judged.describe(),
        "layers": len(found.layers),
        "kept_in_float": {name: list(one.excluded) for name, one in ways.items()},
        "search": told,
        "results": {
            name: {graph: asdict(one) for graph, one in each.items()}
            for name, each in results.items()
        },
    }
    print(json.dumps(document) if as_json else _table(document["judged_on"], results))


def _squares(checkpoint: Checkpoint, folder: Path) -> CalibrationSet:
    """Return what the product takes of a folder."""
    side, preprocessing = checkpoint.patch_side, checkpoint.preprocessing
    layout = layout_from(preprocessing, tiles_of(checkpoint, "rows"), (side, side))
    return collect_frames(
        str(folder), preprocessing, FrameOptions(), cut=lambda one: layout.squares(one, ALONE)
    )


def _keeping(found: Calibration, keep: str) -> Iterator[tuple[str, Calibration]]:
    """Yield the calibration with some modules in floating point, by what they are called."""
    modules = [word for word in keep.split(",") if word]
    if modules == ["each"]:
        modules = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in found.layers))
    for module in modules:
        inside = tuple(name for name in found.layers if is_inside(name, (module,)))
        yield f"int8 but {module}", found.excluding(inside)


def _search(
    bench: _Bench, found: Calibration, search: CalibrationSet, gate: CalibrationSet
) -> tuple[Calibration, dict[str, Any]]:
    """Return what `--precision mixed` makes of it; all of it in INT8 where the gate is missed."""
    files = bench.tower, bench.reducers[SEARCHED], bench.projector
    try:
        report = search_exclusions(
            files, found, search, Gate(), also_on=gate, threads=bench.threads, progress=_tell
        )
    except GateError as error:
        return found, {"missed": str(error)}
    alone = {cost.site: cost.alone.overlap for cost in report.sites}
    return report.calibration, {
        "before": asdict(report.before),
        "after": asdict(report.after),
        "overlap_of_each_site_alone": alone,
    }


@dataclass(frozen=True)
class _Bench:
    """The graphs of a checkpoint in a folder, and the squares they are judged on."""

    folder: Path
    checkpoint: Checkpoint
    judged: CalibrationSet
    threads: int | None

    def __post_init__(self) -> None:
        parts = build_parts(self.checkpoint, list(self._kinds().values()))
        write_graph(parts.trace_tower(), self.tower)
        write_graph(parts.trace_projector(), self.projector)
        for name, reducer in self._kinds().items():
            write_graph(parts.trace_reducer(reducer), self.reducers[name])

    def _kinds(self) -> dict[str, Reducer]:
        patches = self.checkpoint.patch_side**2
        return {
            f"{kind}_{budget}": reducer_for_budget(kind, budget, patches)
            for kind in KINDS
            for budget in BUDGETS
        }

    @property
    def tower(self) -> Path:
        return self.folder / "tower.onnx"

    @property
    def projector(self) -> Path:
        return self.folder / "projector.onnx"

    @property
    def reducers(self) -> dict[str, Path]:
        return {name: self.folder / f"{name}.onnx" for name in self._kinds()}

    def run_tower(self, how: Calibration | str | None) -> list[dict[str, Array]]:
        """Return what the tower hands on of each square: in FP32, FP16, or quantized."""
        file = self.tower
        if how is not None:
            tower = ir.load(file)
            if isinstance(how, Calibration):
                apply_calibration(tower, how)
            else:
                convert_to_fp16(tower)
            file = self.folder / "changed.onnx"
            write_graph(tower, file, opset=tower.opset_imports[""])
        with OrtSession(file, threads=self.threads) as session:
            name = session.input_names[0]
            return [dict(session.run({name: pixels})) for pixels in self.judged]

    def compare(
        self, exact: list[dict[str, Array]], other: list[dict[str, Array]]
    ) -> dict[str, MeasuredAgreement]:
        """Return how alike the reducers choose, by reducer."""
        found = {}
        for name, file in self.reducers.items():
            with OrtSession(file, threads=self.threads) as session:
                pairs = zip(_reduce(session, exact), _reduce(session, other), strict=True)
                agreements = [compare_visual_tokens(*pair) for pair in pairs]
            found[name] = measure_agreement(agreements, self.judged.counts)
        return found


def _reduce(session: OrtSession, handed_on: list[dict[str, Array]]) -> Iterator[VisualTokens]:
    for values in handed_on:
        outputs = session.run({name: values[name] for name in session.input_names})
        yield tokens_of({**outputs, "visual_tokens": outputs[REDUCED]})


def _table(squares: str, results: dict[str, dict[str, MeasuredAgreement]]) -> str:
    lines = [f"Patches kept as FP32 keeps them, on {squares}: mean (95 %), worst square", ""]
    lines += [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for graph in next(iter(results.values())):
        cells = " | ".join(_told(each[graph].overlap) for each in results.values())
        lines.append(f"| {graph} | {cells} |")
    return "\n".join(lines)


def _told(one: Measure) -> str:
    return f"{one.mean:.3f} ({one.low:.3f} to {one.high:.3f}), {one.worst:.3f}"


def _tell(line: str, done: float) -> None:
    print(f"{done:4.0%} {line}", file=sys.stderr)


if __name__ == "__main__":
    app()
