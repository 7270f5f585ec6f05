"""What reduction costs and what it saves, at CLIP-L/14-336, in one process.

Three ways from pixels to the language model's visual tokens, run in turns:

* `reduced`: Foveate's graph with the reducer inside, on ONNX Runtime;
* `full`: the same graph without reduction (all 576 tokens through the projector);
* `papers`: transformers in eager mode with the attention matrices of all layers kept, then the
  reduction by indexing, then the projector, as the papers' released code does it.

Claims: `reduced` / `full` <= 1.00 and `papers` / `reduced` >= 1.8, in FP32 on a CPU. Ratios are
taken within a round, so that a machine that changes its pace changes both.

    python -m benchmarks.reduction_cost --rounds 9 --threads 2 --json
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.clip_large import PATCHES, clip_large_graph, random_clip_large, random_projector
from benchmarks.papers_path import prumerge, run_tower, visionzip
from engines.ort import OrtSession
from export.reducers import Reducer, make_reducer, reducer_for_budget
from export.vision.to_onnx import export_onnx
from tests.photographs import clip_pixels

app = typer.Typer(add_completion=False)

GOALS = {"reduced / full": ("<=", 1.00), "papers / reduced": (">=", 1.80)}


@app.command()
def main(
    reducer: Annotated[str, typer.Option(help="visionzip, prumerge or prumerge_plus.")] = (
        "visionzip"
    ),
    tokens: Annotated[int, typer.Option(help="Visual tokens left, of 576.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after one to warm up.")] = 9,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Time the three ways in turns and print the two ratios."""
    torch.set_num_threads(threads)
    chosen = reducer_for_budget(reducer, tokens, PATCHES)
    with TemporaryDirectory() as folder:
        ways = _prepare(Path(folder), chosen, threads)
        times = {name: np.zeros(rounds) for name in ways}
        for turn in range(-1, rounds):
            print(f"\rround {turn + 1} of {rounds}", end="", file=sys.stderr)
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if turn >= 0:
                    times[name][turn] = (time.perf_counter() - start) * 1e3
        print(file=sys.stderr)
    report = _report(times, chosen, tokens, threads)
    print(json.dumps(report) if as_json else _table(report))
    raise typer.Exit(0 if all(r["met"] for r in report["ratios"].values()) else 1)


def _prepare(folder: Path, reducer: Reducer, threads: int) -> dict[str, Callable[[], object]]:
    print("exporting two graphs of 1.2 GB ...", file=sys.stderr)
    model, projector = random_clip_large(), random_projector()
    pixels = clip_pixels(336)[:1]
    sessions = {}
    for name, kind in (("reduced", reducer), ("full", make_reducer("none"))):
        graph = clip_large_graph(model, projector, kind)
        exported = export_onnx(graph, folder / f"{name}.onnx")
        sessions[name] = OrtSession(exported.file, threads=threads)
    images = torch.from_numpy(pixels)

    def papers() -> object:
        run = run_tower(model, images)
        with torch.inference_mode():
            if reducer.name == "visionzip":
                options: Any = reducer.options
                return projector(visionzip(run, **options)[0])
            return [projector(t) for t in prumerge(run, reducer.name == "prumerge_plus")[0]]

    return {
        "reduced": lambda: sessions["reduced"].run({"pixel_values": pixels}),
        "full": lambda: sessions["full"].run({"pixel_values": pixels}),
        "papers": papers,
    }


def _report(
    times: dict[str, np.ndarray[Any, Any]], reducer: Reducer, tokens: int, threads: int
) -> dict[str, Any]:
    import onnxruntime
    import transformers

    ratios = {}
    for name, (sign, goal) in GOALS.items():
        above, below = (times[way] for way in name.split(" / "))
        value = _spread(above / below)
        met = value["median"] <= goal if sign == "<=" else value["median"] >= goal
        ratios[name] = value | {"goal": f"{sign} {goal:.2f}", "met": met}
    return {
        "shape": "CLIP-L/14-336, projector 1024 -> 4096, FP32, batch 1",
        "reducer": reducer.name,
        "tokens": tokens,
        "threads": threads,
        "milliseconds": {name: _spread(values) for name, values in times.items()},
        "ratios": ratios,
        "processor": platform.processor() or platform.machine(),
        "versions": {
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [10, 50, 90]).round(3).tolist()
    return {"median": middle, "p10": low, "p90": high}


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['shape']}, {report['reducer']} {report['tokens']}, {report['threads']} threads"
    ]
    for name, ms in report["milliseconds"].items():
        lines.append(f"{name:>16}  {ms['median']:8.1f} ms   ({ms['p10']:.1f} to {ms['p90']:.1f})")
    for name, ratio in report["ratios"].items():
        verdict = "met" if ratio["met"] else "NOT met"
        lines.append(
            f"{name:>16}  {ratio['median']:8.3f}      ({ratio['p10']:.3f} to {ratio['p90']:.3f})   "
            f"goal {ratio['goal']}: {verdict}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    app()
