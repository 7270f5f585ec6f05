"""CLIP-L/14-336 with VisionZip on the CPU of an x86 board: `python -m benchmarks.x86`.

The papers' released PyTorch path against ONNX Runtime and OpenVINO over one exported graph. Random
weights, for INT8 calibrated on noise: speed depends on neither. One row after the other, median of
``--runs`` frames, batch 1.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import CLIPVisionModel

from benchmarks import papers_path, random_graphs
from engines import cli
from engines.openvino_session import OpenVinoSession, Rest, cpu_has_bf16
from engines.ort import OrtSession
from engines.session import Session

PIXELS = "pixel_values"
PAPERS = "papers' PyTorch path"


def median_ms(step: Callable[[], object], runs: int) -> float:
    """Run once unmeasured, then ``runs`` times."""
    step()
    spent = []
    for _ in range(runs):
        start = time.perf_counter()
        step()
        spent.append((time.perf_counter() - start) * 1e3)
    return float(np.median(spent))


def time_papers_path(pixels: np.ndarray, runs: int) -> float:
    """Time the released code's way."""
    torch.manual_seed(0)
    model = CLIPVisionModel(random_graphs.CLIP_L_336).eval()
    frame = torch.from_numpy(pixels)

    def encode() -> object:
        with torch.inference_mode():
            run = papers_path.run_tower(model, frame)
            return papers_path.visionzip(run, dominant=54, contextual=10)

    return median_ms(encode, runs)


def measure_all(runs: int, threads: int | None) -> dict[str, float]:
    """Return milliseconds by way."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, 336, 336), dtype=np.float32)
    found: dict[str, float] = {}

    def note(way: str, work: Callable[[], float]) -> None:
        print(f"{way} ...", file=sys.stderr)
        found[way] = work()

    def session(way: str, open_: Callable[[], Session]) -> None:
        with open_() as opened:
            note(way, lambda: median_ms(lambda: opened.run({PIXELS: pixels}), runs))

    note(PAPERS, lambda: time_papers_path(pixels, runs))
    rests: list[Rest] = ["fp32", "bf16"] if cpu_has_bf16() else ["fp32"]
    with tempfile.TemporaryDirectory() as folder:
        fp32, _ = random_graphs.write_graph(Path(folder), "visionzip", random_graphs.CLIP_L_336)
        for precision, file in (
            ("FP32", fp32),
            ("INT8", random_graphs.write_typed_graph(fp32, "int8")),
        ):
            session(f"ONNX Runtime, {precision}", partial(OrtSession, file, threads=threads))
            for rest in rests:
                open_ = partial(OpenVinoSession, file, threads=threads, rest=rest)
                session(f"OpenVINO, {precision}, rest {rest}", open_)
    return found


def main(
    *,
    runs: Annotated[int, typer.Option(min=1)] = 5,
    threads: cli.ThreadsOption = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Time CLIP-L/14-336 with VisionZip on this CPU."""
    found = measure_all(runs, threads)
    if as_json:
        cli.print_json({"milliseconds": found})
        return
    print("| way | ms | against the papers' path |\n|---|---:|---:|")
    for way, spent in found.items():
        print(f"| {way} | {spent:.0f} | {found[PAPERS] / spent:.1f}x |")


if __name__ == "__main__":
    cli.run(main, ["python -m benchmarks.x86 --runs 10"])
