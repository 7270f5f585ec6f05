"""CLIP-L/14-336 with VisionZip on a CUDA GPU, every way we know, in one table.

`python -m benchmarks.gpu` wherever a GPU is: the papers' released PyTorch path, transformers
without reduction, our graph in PyTorch and under torch.compile, ONNX Runtime on CUDA with and
without a CUDA graph, and TensorRT where it is installed. Every way starts with pixels in the host's
memory, float32[B, 3, 336, 336], and ends with projected visual tokens there. Random weights: speed
does not depend on them. A row that cannot run says why instead of a number, and its traceback goes
to stderr. It has not run yet on any GPU of ours.
"""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.board_table import BOARDS, BoardRow, fill_table
from benchmarks.gpu_ways import Case, Step, choose_ways
from engines import cli
from engines.device_facts import DeviceFacts, read_facts, read_memory
from engines.errors import EngineError
from engines.gpu import Gpu, NoGpu, find_gpu
from runtime.camera.budgets.power import Tegrastats

_WARM_UP = 5
_PAGE = Path("docs/jetson.md")
_PACKAGES = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime", "tensorrt", "polygraphy")


@dataclass(frozen=True)
class Timing:
    """One way of encoding a batch."""

    way: str
    median_ms: float | None
    p90_ms: float | None
    problem: str = ""
    power_w: float | None = None
    """Mean of the board while the batches ran; only a Jetson tells it."""
    memory_mb: float | None = None
    """By how much the free memory shrank while the way was loaded and run: the GPU's, or a Jetson's
    one memory."""


def measure(way: str, case: Case, prepare: Callable[[Case], Step]) -> Timing:
    """Warm up, look at what comes out, then time ``case.runs`` batches one by one."""
    print(f"{way} ...", file=sys.stderr)
    before = free_bytes(case)
    try:
        step = prepare(case)
        for _ in range(_WARM_UP):
            tokens = step()
        if tokens.ndim != 3 or len(tokens) != case.batch or not np.isfinite(tokens).all():
            raise EngineError(f"{tokens.dtype}{list(tokens.shape)} came out, or not-a-numbers.")
        spent = []
        if case.meter is not None:
            case.meter.take_watts()  # of the warm-up
        for _ in range(case.runs):
            start = time.perf_counter()
            step()
            spent.append((time.perf_counter() - start) * 1e3)
        power_w = None if case.meter is None else case.meter.take_watts()
        after = free_bytes(case)
        memory_mb = None if before is None or after is None else max(0, before - after) / 1e6
    except Exception as error:  # each library has its own, and the other rows are to be measured
        traceback.print_exc()
        said = " ".join(str(error).split())[:200].replace("|", "/")
        return Timing(way, None, None, f"{type(error).__name__}: {said}")
    median, p90 = float(np.median(spent)), float(np.percentile(spent, 90))
    return Timing(way, median, p90, power_w=power_w, memory_mb=memory_mb)


def free_bytes(case: Case) -> int | None:
    """Return what is free of the memory that the GPU takes; None where nothing tells it."""
    if case.gpu.integrated:
        return read_memory(Path("/proc/meminfo")).get("MemAvailable")
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def run_all(case: Case, ways: dict[str, Callable[[Case], Step]]) -> Iterator[Timing]:
    """Time every way."""
    for way, prepare in ways.items():
        yield measure(way, case, prepare)
        if case.device == "cuda" and torch.cuda.is_available():
            torch.cuda.empty_cache()


def list_versions() -> dict[str, str]:
    """Return the version of everything that is measured and is installed."""
    found = {"python": platform.python_version(), "cuda of torch": str(torch.version.cuda)}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def row_of(timing: Timing) -> str:
    """Return a line of the table."""
    if timing.median_ms is None:
        return f"| {timing.way} | - | - | {timing.problem} |"
    took = [] if timing.power_w is None else [f"{timing.power_w:.1f} W"]
    took += [] if timing.memory_mb is None else [f"{timing.memory_mb:.0f} MB"]
    beside = f" {', '.join(took)}" if took else ""
    return f"| {timing.way} | {timing.median_ms:.2f} | {timing.p90_ms:.2f} |{beside} |"


def board_rows(timings: list[Timing], board: str, measured: str) -> list[BoardRow]:
    """Return timings as rows of docs/jetson.md."""
    return [
        BoardRow(
            board,
            timing.way,
            timing.median_ms,
            timing.p90_ms,
            timing.power_w,
            timing.memory_mb,
            f"{measured}; {timing.problem}" if timing.problem else measured,
        )
        for timing in timings
    ]


def board_here(gpu: Gpu, facts: DeviceFacts) -> tuple[str, str]:
    """Return the board's name in the table, and what it ran.

    Orin's boards share the name of the GPU, so the device tree's model tells them apart.
    """
    ran = [f"JetPack {facts.jetpack}"] if facts.jetpack else []
    ran += [f"power mode {facts.power_mode}"] if facts.power_mode else []
    model = facts.board or ""
    for board, words in BOARDS.items():
        if all(word in model for word in words):
            return board, ", ".join(ran)
    return model or gpu.name, ", ".join([*ran, f"driver {gpu.driver}"])


def main(
    *,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    runs: Annotated[int, typer.Option(min=3, help="Batches to time, one by one.")] = 100,
    only: Annotated[str, typer.Option(help="Only the ways with this in their name.")] = "",
    write: Annotated[
        bool,
        typer.Option("--write", help="Put this board's rows into the table of docs/jetson.md."),
    ] = False,
    page: Annotated[Path, typer.Option(help="Where the table is.")] = _PAGE,
    as_json: cli.JsonOption = False,
) -> None:
    """Time CLIP-L/14-336 with VisionZip on this machine's GPU, every way we know.

    Latency of a batch, the board's power while it ran (a Jetson's), and memory.
    """
    ways = choose_ways(only)
    gpu = find_gpu()
    if isinstance(gpu, NoGpu):
        raise EngineError(
            f"This benchmark measures a CUDA GPU: {gpu.reason}. For a CPU there is "
            "python -m benchmarks.x86."
        )
    measured_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    versions = list_versions()
    if write:
        fill_table(page, [])  # a page without a table is told before anything is measured
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        meter = opened.enter_context(Tegrastats()) if shutil.which("tegrastats") else None
        timings = list(run_all(Case(batch, runs, Path(folder), gpu, meter=meter), ways))
        if write:
            board, ran = board_here(gpu, read_facts())
            fill_table(page, board_rows(timings, board, f"{measured_at[:10]}, {ran}"))
        if as_json:
            document = {"measured_at": measured_at, "gpu": asdict(gpu), "versions": versions}
            rows = [asdict(timing) for timing in timings]
            cli.print_json(document | {"batch": batch, "runs": runs, "timings": rows})
            return
        print(f"{measured_at}, {gpu.name}, sm_{gpu.sm}, driver {gpu.driver}, batch {batch},")
        print(
            f"{runs} runs, CLIP-L/14-336, host to host; "
            + ", ".join(map(" ".join, versions.items()))
        )
        print("\n| way | median ms | p90 ms | |\n|---|---:|---:|---|")
        for timing in timings:
            print(row_of(timing), flush=True)


if __name__ == "__main__":
    cli.run(main, ["python -m benchmarks.gpu --write", "python -m benchmarks.gpu --batch 8 --json"])
