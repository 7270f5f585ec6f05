"""What FP16, INT8 and mixed change for a checkpoint with tiles: patches kept, and right answers.

The tower is calibrated on squares of one folder of pictures. All squares of another folder's go
through it in ONNX Runtime in every precision, each reducer chooses from what it made, and its
choice is held against FP32's. With `--answers` the runtime puts the tokens in order and the
checkpoint's language model answers the questions in float32 (`benchmarks.packed_answers`), so that
nothing but the vision graph differs. Claims of a trained checkpoint: an overlap of 0.97, and
answers within 1 point. The layers that `mixed` leaves in floating point are searched with VisionZip
at 64 of each square, on pictures of the first folder.

    python models/pocket-onevision/pictures.py --seed 77001 --count 128 --out build/given
    python models/pocket-onevision/pictures.py --seed 77002 --count 100 --out build/others
    python -m benchmarks.square_precision --frames build/given --held-out build/others
    python -m benchmarks.square_precision --frames build/given --held-out build/test --answers

`--keep tower.layers.5.attention` adds INT8 with these layers in floating point (several, with
commas between them; `each` does so for one encoder layer after the other).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
import typer
from numpy.typing import NDArray

from benchmarks.packed_answers import Examination
from calibration.agreement.graphs import tokens_of
from calibration.agreement.measured import Measure, MeasuredAgreement, measure_agreement
from calibration.agreement.token_metrics import Gate, compare_visual_tokens
from calibration.frames.dataset import CalibrationSet, collect_frames
from calibration.scales.apply import apply_calibration
from calibration.scales.calibrate import CalibrationOptions, calibrate
from calibration.scales.calibration_file import Calibration
from calibration.sensitivity.search import search_exclusions
from engines.errors import GateError, OptionError
from engines.ort import OrtSession
from engines.session import Array
from export.build.tiles import tiles_of
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.reducers import Reducer, make_reducer, reducer_for_budget
from export.vision.parts import REDUCED, build_parts
from graphs.float16 import convert_to_fp16
from graphs.graph_file import write_graph
from graphs.modules import is_inside
from runtime.vision import VisualTokens
from runtime.vision.layouts.llava_next import LlavaNext
from runtime.vision.parallel_resize import ALONE
from runtime.vision.pictures import load_picture

from evaluate import paired_interval  # isort: skip - found by packed_answers

ONEVISION = Path(__file__).resolve().parents[1] / "models" / "pocket-onevision"
KINDS = ("visionzip", "top_attention", "scope", "divprune")
BUDGETS = (64, 16)
SEARCHED = "visionzip_64"

Values = dict[str, Array]
app = typer.Typer(add_completion=False)


@app.command()
def main(
    frames: Annotated[Path, typer.Option(help="Pictures to calibrate and search on.")],
    held_out: Annotated[Path, typer.Option(help="Other pictures; with questions, for --answers.")],
    model: Annotated[Path, typer.Option(help="Checkpoint with tiles.")] = ONEVISION,
    keep: Annotated[str, typer.Option(help="More INT8, with these in floating point.")] = "",
    search: Annotated[bool, typer.Option(help="Search what mixed gives back.")] = True,
    answers: Annotated[bool, typer.Option("--answers", help="Ask the questions, too.")] = False,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Calibrate once, then hold every precision against FP32, reducer by reducer."""
    checkpoint = open_checkpoint(str(model))
    layout = _layout_of(checkpoint)
    sets = collect_frames(
        str(frames), checkpoint.preprocessing, cut=lambda one: layout.squares(one, ALONE)
    ).split()
    judged = _Squares(tuple(sorted(held_out.glob("*.png"))), layout)
    with TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), checkpoint, judged, threads)
        options = CalibrationOptions(threads=threads)
        found = calibrate(bench.tower, sets.calibration, options, progress=_tell)
        ways = {"int8": found} | dict(_keeping(found, keep))
        told: dict[str, Any] = {}
        if search:
            ways["mixed"], told = _search(bench, found, sets.search, sets.gate)
        exact = bench.run_tower(None)
        made = {"fp16": bench.run_tower("fp16")}
        made |= {name: bench.run_tower(calibration) for name, calibration in ways.items()}
        results = {name: bench.compare(exact, values) for name, values in made.items()}
        right = _answer(bench, {"fp32": exact} | made, model, held_out) if answers else {}
    document: dict[str, Any] = {
        "calibrated_on": sets.calibration.describe(),
        "judged_on": f"{sum(judged.counts)} squares of {len(judged.counts)} pictures",
        "layers": len(found.layers),
        "kept_in_float": {name: list(one.excluded) for name, one in ways.items()},
        "search": told,
        "results": {
            name: {graph: asdict(one) for graph, one in each.items()}
            for name, each in results.items()
        },
        "answers": right,
    }
    print(json.dumps(document) if as_json else _table(document["judged_on"], results, right))


def _layout_of(checkpoint: Checkpoint) -> LlavaNext:
    tiles, side = tiles_of(checkpoint, "rows"), checkpoint.patch_side
    if tiles is None:
        raise OptionError(
            f"{checkpoint.name} does not cut pictures into tiles. `benchmarks.accuracy` and "
            "`benchmarks.quantization` measure such checkpoints."
        )
    newline = checkpoint.image_newline().numpy()
    return LlavaNext(checkpoint.preprocessing, tiles, side, side, newline)


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
    return report.calibration, {
        "before": asdict(report.before),
        "after": asdict(report.after),
        "overlap_of_each_site_alone": {one.site: one.alone.overlap for one in report.sites},
    }


@dataclass(frozen=True)
class _Squares:
    """All squares of some pictures, made when they are asked for."""

    paths: tuple[Path, ...]
    layout: LlavaNext

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        shapes = [load_picture(path).shape for path in self.paths]
        return [(shape[0], shape[1]) for shape in shapes]

    @property
    def counts(self) -> list[int]:
        """How many squares each picture has."""
        return [self.layout.grid(size).squares for size in self.sizes]

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        """Yield float32[1, 3, side, side]."""
        for path in self.paths:
            for square in self.layout.pixel_values([load_picture(path)], ALONE):
                yield square[None]


@dataclass(frozen=True)
class _Bench:
    """The graphs of a checkpoint in a folder, and the squares they are judged on."""

    folder: Path
    checkpoint: Checkpoint
    judged: _Squares
    threads: int

    def __post_init__(self) -> None:
        parts = build_parts(self.checkpoint, list(self.kinds.values()))
        write_graph(parts.trace_tower(), self.tower)
        write_graph(parts.trace_projector(), self.projector)
        for name, reducer in self.kinds.items():
            write_graph(parts.trace_reducer(reducer), self.reducers[name])

    @cached_property
    def kinds(self) -> dict[str, Reducer]:
        patches = self.checkpoint.patch_side**2
        return {
            f"{kind}_{budget}": reducer_for_budget(kind, budget, patches)
            for kind in KINDS
            for budget in BUDGETS
        } | {"none": make_reducer("none", class_token=self.checkpoint.keeps_class_token)}

    @property
    def tower(self) -> Path:
        return self.folder / "tower.onnx"

    @property
    def projector(self) -> Path:
        return self.folder / "projector.onnx"

    @property
    def reducers(self) -> dict[str, Path]:
        return {name: self.folder / f"{name}.onnx" for name in self.kinds}

    def run_tower(self, how: Calibration | str | None) -> list[Values]:
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

    def compare(self, exact: list[Values], other: list[Values]) -> dict[str, MeasuredAgreement]:
        """Return how alike the reducers choose, by reducer."""
        found = {}
        for name in self.reducers:
            if name == "none":
                continue
            pairs = zip(self.reduce(name, exact), self.reduce(name, other), strict=True)
            agreements = [compare_visual_tokens(*pair) for pair in pairs]
            found[name] = measure_agreement(agreements, self.judged.counts)
        return found

    def reduce(self, name: str, handed_on: list[Values]) -> Iterator[VisualTokens]:
        """Yield what a reducer leaves of each square, before the projector."""
        with OrtSession(self.reducers[name], threads=self.threads) as session:
            for values in handed_on:
                outputs = session.run({one: values[one] for one in session.input_names})
                yield tokens_of({**outputs, "visual_tokens": outputs[REDUCED]})

    def see(self, name: str, handed_on: list[Values]) -> VisualTokens:
        """Return the tokens that the language model gets of each picture."""
        with OrtSession(self.projector, threads=self.threads) as session:
            squares = [
                replace(one, tokens=session.run({REDUCED: one.tokens})["visual_tokens"], order=None)
                for one in self.reduce(name, handed_on)
            ]
        layout = replace(self.judged.layout, all_tokens=name == "none")
        return layout.assemble(VisualTokens.stacked(squares, {}), self.judged.sizes)


def _answer(
    bench: _Bench, made: dict[str, list[Values]], model: Path, data: Path
) -> dict[str, dict[str, Any]]:
    """Return the share of right answers by reducer and precision, and what it is to FP32's."""
    import torch
    from transformers import LlavaOnevisionForConditionalGeneration

    torch.set_num_threads(bench.threads)
    language = LlavaOnevisionForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    language.set_attn_implementation("plain")
    examination = Examination(model, data, None, language.eval())
    if tuple(examination.pictures) != bench.judged.paths:
        raise OptionError(f"{data}: the questions are not about all of its pictures, in order.")
    told: dict[str, dict[str, Any]] = {}
    for name in bench.kinds:
        seen = {way: bench.see(name, values) for way, values in made.items()}
        right = {way: examination.right_answers(one.tokens, one.valid) for way, one in seen.items()}
        told[name] = {
            way: {
                "right": float(one.mean()),
                "difference_95": paired_interval(one, right["fp32"], examination.picture_of),
            }
            for way, one in right.items()
        }
    return told


def _table(
    squares: str,
    results: dict[str, dict[str, MeasuredAgreement]],
    answers: dict[str, dict[str, Any]],
) -> str:
    lines = [f"Patches kept as FP32 keeps them, on {squares}: mean (95 %), worst square", ""]
    lines += [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for graph in next(iter(results.values())):
        cells = " | ".join(_told(each[graph].overlap) for each in results.values())
        lines.append(f"| {graph} | {cells} |")
    if not answers:
        return "\n".join(lines)
    lines += ["", "Right answers (95 % of the difference to FP32, in points)", ""]
    lines += [f"| | fp32 | {' | '.join(results)} |", "|---" * (len(results) + 2) + "|"]
    for graph, row in answers.items():
        shares = [f"{row['fp32']['right']:.1%}"]
        for way in results:
            low, high = (100 * end for end in row[way]["difference_95"])
            shares.append(f"{row[way]['right']:.1%} ({low:+.1f} to {high:+.1f})")
        lines.append(f"| {graph} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _told(one: Measure) -> str:
    return f"{one.mean:.3f} ({one.low:.3f} to {one.high:.3f}), {one.worst:.3f}"


def _tell(line: str, done: float) -> None:
    print(f"{done:4.0%} {line}", file=sys.stderr)


if __name__ == "__main__":
    app()
