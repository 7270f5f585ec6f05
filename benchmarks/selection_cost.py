"""What choosing patches costs by itself: a reducer's graph alone, at CLIP-L/14-336.

Random features of 576 patches and 1024 numbers enter each reducer as `export.build` writes it, and
ONNX Runtime is timed on one frame. Rounds go through all graphs in turn, so that a machine that
changes its pace changes all; the fastest round says what the work costs, the median what it cost
beside whatever else ran.

    python -m benchmarks.selection_cost --threads 1,2 --json
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.ort import OrtSession
from export.reducers import Reducer, reducer_for_budget
from export.towers import Scoring, TowerOutput, without_scores

PATCHES, WIDTH, KEY_WIDTH = 576, 1024, 64
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "scope": ("scope", {}, (8, 16, 32, 64)),
    "scope, 4 picks a step": ("scope", {"picks_per_step": 4}, (16, 64)),
    "scope, 8 picks a step": ("scope", {"picks_per_step": 8}, (64,)),
    "scope, nearest merged": ("scope", {"merge": "nearest"}, (16,)),
    "scope, coverage 0.8": ("scope", {"coverage": 0.8}, (64,)),
    "divprune": ("divprune", {}, (16, 64)),
    "top_attention": ("top_attention", {}, (64,)),
    "visionzip": ("visionzip", {}, (64,)),
}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    threads: Annotated[str, typer.Option(help="Comma between them.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after one to warm up.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Time every case and print milliseconds a frame."""
    counts = [int(word) for word in threads.split(",")]
    feeds = random_frame()
    report: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        graphs: dict[tuple[str, int], Path] = {}
        for name, (kind, options, budgets) in CASES.items():
            for tokens in budgets:
                reducer = reducer_for_budget(kind, tokens, PATCHES, **options)
                file = Path(folder) / f"{len(graphs)}.onnx"
                export_reducer(reducer, file)
                graphs[name, tokens] = file
        for count in counts:
            for (name, tokens), times in time_graphs(graphs, feeds, count, rounds).items():
                row = {"reducer": name, "tokens": tokens, "threads": count}
                row |= {"fastest_ms": round(float(times.min()), 2)}
                report.append(row | {"median_ms": round(float(np.median(times)), 2)})
    load = round(os.getloadavg()[0], 1)
    if as_json:
        print(json.dumps({"load": load, "cases": report}))
        return
    print(f"load {load}\n\n| reducer | tokens | threads | fastest, ms | median, ms |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in report:
        print("| " + " | ".join(map(str, row.values())) + " |")


def random_frame() -> dict[str, NDArray[np.float32]]:
    """Return features, scores and keys of one frame, patches in a few groups of alike ones."""
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((12, WIDTH))[rng.integers(0, 12, PATCHES)]
    features = groups + rng.standard_normal((PATCHES, WIDTH))
    frame = {
        "features": features,
        "scores": rng.random(PATCHES),
        "keys": rng.standard_normal((PATCHES, KEY_WIDTH)),
    }
    return {name: part[None].astype(np.float32) for name, part in frame.items()}


def time_graphs(
    graphs: Mapping[tuple[str, int], Path],
    feeds: Mapping[str, NDArray[np.float32]],
    threads: int,
    rounds: int,
) -> dict[tuple[str, int], NDArray[np.float64]]:
    """Return milliseconds of each round for each graph."""
    sessions = {case: OrtSession(file, threads=threads) for case, file in graphs.items()}
    times = {case: np.zeros(rounds) for case in graphs}
    for turn in range(-1, rounds):
        for case, session in sessions.items():
            given = {name: feeds[name] for name in session.input_names}
            start = time.perf_counter()
            session.run(given)
            if turn >= 0:
                times[case][turn] = (time.perf_counter() - start) * 1e3
    for session in sessions.values():
        session.close()
    return times


class _Alone(nn.Module):
    def __init__(self, reducer: Reducer) -> None:
        super().__init__()
        self.reducer = reducer

    def forward(self, features: Tensor, *scored: Tensor) -> tuple[Tensor, ...]:
        tower = TowerOutput(features, *scored) if scored else without_scores(features)
        reduced = self.reducer(tower)
        return reduced.tokens, reduced.valid, reduced.origin, reduced.assignment


def export_reducer(reducer: Reducer, file: Path) -> None:
    """Write a reducer alone as ONNX, the batch dynamic."""
    example = [torch.randn(2, PATCHES, WIDTH)]
    if reducer.scoring is not Scoring.NONE:
        example += [torch.rand(2, PATCHES), torch.randn(2, PATCHES, KEY_WIDTH)]
    names = ["features", "scores", "keys"][: len(example)]
    batched = [{0: "batch"}, *([({0: "batch"},) * 2] if len(example) > 1 else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about itself
        torch.onnx.export(
            _Alone(reducer).eval(),
            tuple(example),
            file,
            input_names=names,
            dynamo=True,
            opset_version=18,
            dynamic_shapes=tuple(batched),
            verbose=False,
        )


if __name__ == "__main__":
    app()
