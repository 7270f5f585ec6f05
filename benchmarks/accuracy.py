"""What a token budget, a reducer and a precision cost in right answers.

The pocket checkpoint's held-out pictures go through real vision graphs on ONNX Runtime (tower,
reducer and projector as `export.build` writes them for several budgets), and every question is
answered by the checkpoint's language model in float32 (`benchmarks.packed_answers`), so that
nothing but the vision graph differs. INT8 is calibrated on scenes of a seed of their own. Claims:
float16 and INT8 within 1 point of float32.

    python -m benchmarks.accuracy --json
    python -m benchmarks.accuracy --quick --precisions fp32
    python -m benchmarks.accuracy --write docs/accuracy.md

Results are kept under `build/accuracy`, so an interrupted run continues where it stood.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from benchmarks.accuracy_report import (
    Result,
    budgets_from_results,
    summarize,
    table_from_results,
    write_report,
)
from benchmarks.packed_answers import POCKET, Examination
from calibration.scales.apply import apply_calibration
from calibration.scales.calibrate import CalibrationOptions, calibrate
from calibration.scales.calibration_file import Calibration, load_calibration
from calibration.scales.number_format import FP8, INT8
from engines.ort import OrtSession
from export.checkpoint.accuracy_table import ACCURACY_FILE
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.reducers import Reducer, make_reducer, reducer_for_budget
from export.towers import Scoring
from export.vision.parts import REDUCED, VisionParts
from export.vision.vision_module import build_vision_module
from graphs.float16 import write_fp16_graph
from graphs.graph_file import HALF_OPSET, set_opset, write_graph
from runtime.vision.pictures import load_picture
from runtime.vision.preprocess import preprocess_batch

from scenes import generate_scene  # isort: skip - found by packed_answers

BUDGETS = (192, 128, 64, 32, 16, 8)
REDUCERS: dict[str, tuple[str, dict[str, Any]]] = {
    "visionzip": ("visionzip", {}),
    "visionzip_reference": ("visionzip", {"merge": "reference"}),
    "prumerge": ("prumerge", {}),
    "prumerge_plus": ("prumerge_plus", {}),
    "scope": ("scope", {}),
    "divprune": ("divprune", {}),
    "top_attention": ("top_attention", {}),
    "uniform": ("uniform", {}),
    "random": ("random", {}),
    "pool": ("pool", {}),
}
"""What the tables call a reducer -> its registry name and options."""
PRECISIONS = ("fp32", "fp16", "int8")
EIGHT_BITS = {"int8": INT8, "fp8": FP8}
CALIBRATION_SEED, CALIBRATION_PICTURES = 4_000_000, 128
_PICTURES_AT_ONCE = 10
_CACHE = Path("build/accuracy")

Values = dict[str, NDArray[Any]]
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Setting:
    """One cell of the table.

    Attributes:
        reducer: a name of `REDUCERS`, or "none".
        tokens: the budget; of all patches for "none".
        precision: of the vision graph.
    """

    reducer: str
    tokens: int
    precision: str

    def make_reducer(self, checkpoint: Checkpoint) -> Reducer:
        """Make the reducer this cell is about."""
        if self.reducer == "none":
            return make_reducer("none", class_token=checkpoint.keeps_class_token)
        name, options = REDUCERS[self.reducer]
        return reducer_for_budget(name, self.tokens, checkpoint.patch_side**2, **options)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Checkpoint of the pocket architecture.")] = POCKET,
    data: Annotated[Path, typer.Option(help="Pictures and questions.jsonl.")] = POCKET / "test",
    precisions: Annotated[str, typer.Option(help="Comma between them.")] = ",".join(PRECISIONS),
    reducers: Annotated[str, typer.Option(help="Comma between them.")] = ",".join(REDUCERS),
    tokens: Annotated[str, typer.Option(help="Comma between them.")] = ",".join(map(str, BUDGETS)),
    quick: Annotated[bool, typer.Option("--quick", help="30 pictures, 64 tokens only.")] = False,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is kept.")] = False,
    write: Annotated[
        Path | None,
        typer.Option(help="Page whose tables to replace; the checkpoint gets its figures too."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure exact match for every budget, reducer and precision."""
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model)
    examination = Examination(model, data, 30 if quick else None)
    settings = list_settings(
        checkpoint.patch_side**2,
        [64] if quick else [int(word) for word in tokens.split(",")],
        reducers.split(","),
        precisions.split(","),
    )
    bench = Bench(checkpoint, examination, threads, fresh)
    console = Console(stderr=True)
    results = [
        bench.measure(setting) for setting in track(settings, "Measuring accuracy", console=console)
    ]
    summary = summarize(results, examination)
    if write is not None:
        write_report(write, results, examination)
        (model / ACCURACY_FILE).write_text(budgets_from_results(results, examination), "utf-8")
    print(json.dumps(summary) if as_json else table_from_results(results, examination))
    raise typer.Exit(0 if summary["met"] else 1)


def list_settings(
    patches: int, budgets: Sequence[int], reducers: Sequence[str], precisions: Sequence[str]
) -> list[Setting]:
    """Return every cell, all tokens first; float32, which others are held against, always."""
    cells = [("none", patches)]
    cells += [(reducer, tokens) for tokens in budgets for reducer in reducers if reducer != "none"]
    wanted = dict.fromkeys(["fp32", *precisions])
    return [Setting(*cell, precision) for cell in cells for precision in wanted]


class Bench:
    """Measures cells, and keeps what it measured.

    The tower runs once for each precision, since it is the same for all budgets; so do the bundles
    of several budgets.

    Args:
        checkpoint: whose tower and projector the graphs hold.
        examination: the questions, and the language model.
        threads: of ONNX Runtime.
        fresh: measure again what is kept.
    """

    def __init__(
        self, checkpoint: Checkpoint, examination: Examination, threads: int, fresh: bool
    ) -> None:
        self._checkpoint = checkpoint
        self._examination = examination
        self._threads = threads
        pictures = [load_picture(path) for path in examination.pictures]
        self._pixels = preprocess_batch(pictures, checkpoint.preprocessing)  # [B, 3, H, W]
        self._folder = _CACHE / _digest(checkpoint, examination)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lines = self._folder / "results.jsonl"
        self._seen: dict[Path, list[Values]] = {}
        if fresh:
            self._lines.unlink(missing_ok=True)

    def measure(self, setting: Setting) -> Result:
        """Return what one cell came to, measured now unless it was before."""
        kept = self._kept()
        if setting in kept:
            return kept[setting]
        started = time.perf_counter()
        tower, reducer, projector = graphs = self._graphs(setting)
        with (
            OrtSession(reducer, threads=self._threads) as chosen,
            OrtSession(projector, threads=self._threads) as last,
        ):
            left = [
                chosen.run({name: batch[name] for name in chosen.input_names})
                for batch in self._see(tower)
            ]
            tokens = [last.run({REDUCED: one[REDUCED]})["visual_tokens"] for one in left]
        valid = np.concatenate([one["valid_count"] for one in left])
        right = self._examination.right_answers(np.concatenate(tokens), valid)
        digest = hashlib.sha256(b"".join(graph.read_bytes() for graph in graphs))
        result = Result(
            **asdict(setting),
            mean_tokens=float(valid.mean()),
            right=right,
            graph_sha256=digest.hexdigest(),
            seconds=round(time.perf_counter() - started, 1),
        )
        with self._lines.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(result.to_json()) + "\n")
        return result

    def _kept(self) -> dict[Setting, Result]:
        """Return what was measured, also by another run of this benchmark beside this one."""
        lines = self._lines.read_text("utf-8").splitlines() if self._lines.exists() else []
        results = [Result.from_json(json.loads(line)) for line in lines]
        return {Setting(one.reducer, one.tokens, one.precision): one for one in results}

    def _see(self, tower: Path) -> list[Values]:
        """Return what a tower makes of the pictures, in batches."""
        if tower not in self._seen:
            with OrtSession(tower, threads=self._threads) as session:
                self._seen[tower] = [
                    session.run({"pixel_values": self._pixels[start : start + _PICTURES_AT_ONCE]})
                    for start in range(0, len(self._pixels), _PICTURES_AT_ONCE)
                ]
        return self._seen[tower]

    def _graphs(self, setting: Setting) -> tuple[Path, Path, Path]:
        """Return a cell's tower, reducer and projector, written unless they are there."""
        reducer = setting.make_reducer(self._checkpoint)
        scored = reducer  # who reads no scores is served by VisionZip's tower
        if reducer.scoring is Scoring.NONE:
            scored = reducer_for_budget("visionzip", 64, self._checkpoint.patch_side**2)
        chosen = f"{setting.reducer}_{setting.tokens}"
        stems = (f"tower_{scored.scoring.value}", chosen, "projector")
        files = [self._folder / f"{stem}_fp32.onnx" for stem in stems]
        if not all(file.exists() for file in files):
            parts = VisionParts(build_vision_module(self._checkpoint, scored))
            traces: tuple[Callable[[], ir.Model], ...] = (
                parts.trace_tower,
                partial(parts.trace_reducer, reducer),
                parts.trace_projector,
            )
            for file, trace in zip(files, traces, strict=True):
                if not file.exists():
                    write_graph(trace(), file)
        seen, left, made = (self._in_precision(file, setting.precision) for file in files)
        return seen, left, made

    def _in_precision(self, full: Path, precision: str) -> Path:
        """Return a float32 graph in another precision; INT8 and FP8 are the tower's."""
        tower = full.name.startswith("tower")
        if precision == "fp32" or (precision in EIGHT_BITS and not tower):
            return full
        wanted = full.with_name(full.name.replace("fp32", precision))
        if not wanted.exists() and precision in EIGHT_BITS:
            model = ir.load(full)
            form = EIGHT_BITS[precision]
            apply_calibration(model, self._calibrated_on(full), form)
            if form is FP8:
                set_opset(model, HALF_OPSET)
            write_graph(model, wanted, opset=model.opset_imports[""])
        elif not wanted.exists():
            write_fp16_graph(full, wanted)
        return wanted

    def _calibrated_on(self, tower: Path) -> Calibration:
        """Return the tower's calibration, made on its graph unless it is there."""
        file = self._folder / "calibration.json"
        if not file.exists():
            drawn = [generate_scene(CALIBRATION_SEED, at)[1] for at in range(CALIBRATION_PICTURES)]
            frames = [preprocess_batch([one], self._checkpoint.preprocessing) for one in drawn]
            options = CalibrationOptions(threads=self._threads)
            calibrate(tower, frames, options).save(file)
        return load_calibration(file)


def _digest(checkpoint: Checkpoint, examination: Examination) -> str:
    """Return a name for what is measured: weights, configuration, questions."""
    digest = hashlib.sha256()
    for file in ("model.safetensors", "config.json"):
        digest.update((checkpoint.root / file).read_bytes())
    for path, asked in zip(examination.pictures, examination.questions, strict=True):
        digest.update(path.read_bytes() + repr(asked).encode())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    app()
