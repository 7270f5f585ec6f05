"""What INT8 costs in patches and tokens, by the way activation ranges are chosen.

The tower is calibrated on pictures that the bundled checkpoint's generator draws and judged on its
held-out test pictures, graph by graph, in ONNX Runtime. Claims: with the layers that the search
excludes, mean overlap of kept patches >= 0.97 and mean cosine of matched tokens >= 0.99.

    python -m benchmarks.quantization --save models/pocket-llava/calibration.json --json

`--save` keeps the calibration of the default method with what the search excluded.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, get_args

import numpy as np
import onnx_ir as ir
import typer
from numpy.typing import NDArray

from benchmarks.accuracy import CALIBRATION_SEED
from calibration.agreement.graphs import compare_graphs
from calibration.agreement.token_metrics import Gate
from calibration.scales.apply import apply_calibration
from calibration.scales.calibrate import CalibrationOptions, calibrate
from calibration.scales.calibration_file import Calibration
from calibration.scales.ranges import Method
from calibration.sensitivity.search import search_exclusions
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.reducers import reducer_for_budget
from export.vision.to_onnx import trace_graph
from export.vision.vision_module import build_vision_module
from graphs.graph_file import write_graph
from runtime.vision.pictures import load_picture
from runtime.vision.preprocess import preprocess_batch

from scenes import generate_scene  # isort: skip - found by benchmarks.accuracy

GRAPHS = (("visionzip", 64), ("visionzip", 192), ("prumerge", 64), ("prumerge_plus", 144))
Frames = list[NDArray[np.float32]]

app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="LLaVA checkpoint.")] = Path("models/pocket-llava"),
    frames: Annotated[int, typer.Option(help="Pictures to calibrate on.")] = 96,
    searched: Annotated[
        int, typer.Option(help="Other pictures for the search; as many more must agree with it.")
    ] = 32,
    held_out: Annotated[int, typer.Option(help="Test pictures to judge by.")] = 100,
    compare: Annotated[bool, typer.Option(help="Compare all methods as well.")] = True,
    threads: Annotated[int | None, typer.Option()] = None,
    save: Annotated[Path | None, typer.Option(help="Where to keep the search's result.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compare ways to calibrate, then search what to leave in floating point."""
    checkpoint = open_checkpoint(str(model))
    drawn = _draw(checkpoint, frames + 2 * searched)
    pictures = sorted((model / "test").glob("*.png"))
    chosen = pictures[:: max(1, len(pictures) // held_out)][:held_out]
    test = [preprocess_batch([load_picture(file)], checkpoint.preprocessing) for file in chosen]
    with TemporaryDirectory() as folder:
        bench = _Bench(Path(folder), checkpoint, test, threads)
        first = bench.graph(*GRAPHS[0])
        options = CalibrationOptions(threads=threads)
        calibration = calibrate(first, drawn[:frames], options, progress=_tell)
        report = search_exclusions(
            (first,),
            calibration,
            drawn[frames : frames + searched],
            Gate(),
            also_on=drawn[frames + searched :],
            threads=threads,
            progress=_tell,
        )
        if save is not None:
            report.calibration.save(save)
        graphs: list[dict[str, Any]] = [
            {"graph": f"{name} {count}", "precision": precision, **bench.judge(one, (name, count))}
            for name, count in GRAPHS
            for precision, one in (("int8", calibration), ("mixed", report.calibration))
        ]
        methods = bench.compare_methods(drawn[:frames], options) if compare else []
    result = {
        "frames": frames,
        "held_out": len(test),
        "methods": methods,
        "excluded": report.calibration.excluded,
        "search": {"before": asdict(report.before), "after": asdict(report.after)},
        "graphs": graphs,
    }
    print(json.dumps(result) if as_json else _table(result))
    met = graphs[1]["overlap"] >= 0.97 and graphs[1]["cosine"] >= 0.99
    raise typer.Exit(0 if met else 1)


class _Bench:
    """Graphs of a checkpoint, and how far quantized ones are from them on the test pictures."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, test: Frames, threads: int | None
    ) -> None:
        self.folder, self.checkpoint, self.test, self.threads = folder, checkpoint, test, threads

    def graph(self, reducer: str, tokens: int) -> Path:
        """Return the float32 graph."""
        file = self.folder / f"{reducer}_{tokens}.onnx"
        if not file.exists():
            chosen = reducer_for_budget(reducer, tokens, self.checkpoint.patch_side**2)
            write_graph(trace_graph(build_vision_module(self.checkpoint, chosen)), file)
        return file

    def compare_methods(self, frames: Frames, options: CalibrationOptions) -> list[dict[str, Any]]:
        """Return the agreement of the first graph by each way to choose ranges."""
        rows = []
        for method in get_args(Method):
            for smooth in (False, True):
                ways = replace(options, method=method, smooth=smooth)
                made = calibrate(self.graph(*GRAPHS[0]), frames, ways, progress=_tell)
                rows.append({"method": method, "smooth": smooth, **self.judge(made, GRAPHS[0])})
        return rows

    def judge(self, calibration: Calibration, graph: tuple[str, int]) -> dict[str, float]:
        """Return the agreement of the quantized graph with the float32 one."""
        exact = self.graph(*graph)
        model, quantized = ir.load(exact), self.folder / "quantized.onnx"
        apply_calibration(model, calibration)
        write_graph(model, quantized)
        agreement = compare_graphs([exact], [quantized], self.test, self.threads)
        found = {name: round(value, 5) for name, value in asdict(agreement).items()}
        print(f"\n{calibration.method} on {' '.join(map(str, graph))}: {found}", file=sys.stderr)
        return found


def _draw(checkpoint: Checkpoint, count: int) -> Frames:
    scenes = (generate_scene(CALIBRATION_SEED, at)[1] for at in range(count))
    return [preprocess_batch([scene], checkpoint.preprocessing) for scene in scenes]


def _tell(line: str, done: float) -> None:
    print(f"\r{done:4.0%} {line:60}", end="", file=sys.stderr, flush=True)


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['frames']} frames calibrated, {result['held_out']} test pictures"]
    for row in result["methods"]:
        way = f"{row['method']}{', smoothed' if row['smooth'] else ''}"
        lines.append(f"  {way:22} overlap {row['overlap']:.4f}  cosine {row['cosine']:.5f}")
    lines.append(f"in floating point: {', '.join(result['excluded'])}")
    for row in result["graphs"]:
        lines.append(
            f"  {row['graph']:18} {row['precision']:6} overlap {row['overlap']:.4f}  "
            f"worst {row['worst']:.4f}  merged {row['assignment']:.4f}  cosine {row['cosine']:.5f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    app()
