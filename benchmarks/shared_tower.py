"""What four budgets cost at CLIP-L/14-336 with one tower for all, and with a whole graph each.

Memory: sessions of 64, 32, 128 and 576 tokens are opened and run one after the other, in a process
of its own for each layout, and the resident memory is read after each. Whole graphs point into the
same files of weights, as bundles had them before. Time: the 64-token budget in both layouts takes
turns in one process; ratios of wall and of processor time are taken within a round. The outputs of
the two are compared.

Claims: four budgets take at most 1.1 x the memory of one whole graph, and an encode takes at most
1 % longer. `--plans` builds TensorRT-RTX plans in FP16 and compares their sizes instead.

    python -m benchmarks.shared_tower --engine ort --rounds 9 --threads 1
    python -m benchmarks.shared_tower --plans
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import onnx_ir as ir
import typer

from engines.chained_session import ChainedSession, SharedStages
from engines.session import Session, Stage
from export.reducers import Reducer, make_reducer, reducer_for_budget
from graphs.graph_file import ExportedGraph, write_graph
from graphs.joined import load_joined

PATCHES = 576
BUDGETS = (64, 32, 128, 576)
"""The first is timed."""
TOWER, PROJECTOR = "tower.onnx", "projector.onnx"
Engine = Literal["ort", "openvino"]
Layout = Literal["whole", "shared"]
app = typer.Typer(add_completion=False)


@app.command()
def main(
    engine: Annotated[Engine, typer.Option(help="ort or openvino.")] = "ort",
    rounds: Annotated[int, typer.Option(min=1, help="Pairs after one to warm up.")] = 9,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    width: Annotated[int, typer.Option(help="Of the language model.")] = 4096,
    plans: Annotated[bool, typer.Option("--plans", help="Compare sizes of plans.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Keep the graphs there, and reuse.")] = None,
    layout: Annotated[
        str, typer.Option(help="Measure the memory of this one only: whole or shared.")
    ] = "",
    budgets: Annotated[
        int, typer.Option(min=1, max=len(BUDGETS), help="How many are opened.")
    ] = len(BUDGETS),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure memory and time of both layouts, or the sizes of plans."""
    with TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        if layout:
            print(json.dumps(measure_memory(place, engine, layout, threads, budgets)))
            return
        if not (place / "done").exists():
            write_graphs(place, width)
        if plans:
            report = measure_plans(place)
        else:
            memory = {
                name: _in_a_process(place, engine, name, threads, budgets) for name in LAYOUTS
            }
            one = memory["whole"]["grown_mb"][0]
            report = {
                "engine": engine,
                "threads": threads,
                "width": width,
                "memory": memory,
                "budgets shared / one whole graph": round(
                    memory["shared"]["grown_mb"][-1] / one, 3
                ),
                **measure_time(place, engine, rounds, threads),
            }
    print(json.dumps(report) if as_json else json.dumps(report, indent=1))


LAYOUTS: tuple[Layout, ...] = ("whole", "shared")


def write_graphs(folder: Path, width: int) -> None:
    """Write tower, reducers and projector, and the same joined to whole graphs."""
    import torch
    from torch import nn

    from benchmarks.clip_large import clip_large_graph, random_clip_large
    from export.vision.parts import VisionParts

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    layers = (nn.Linear(1024, width), nn.GELU(), nn.Linear(width, width))
    projector = nn.Sequential(*layers).eval().requires_grad_(False)
    whole = clip_large_graph(random_clip_large(), projector, reducer_of(BUDGETS[0]))
    parts = VisionParts(whole)
    write_graph(parts.trace_tower(), folder / TOWER, external_weights=True)
    write_graph(parts.trace_projector(), folder / PROJECTOR, external_weights=True)
    for budget in BUDGETS:
        write_graph(parts.trace_reducer(reducer_of(budget)), folder / f"reducer_{budget}.onnx")
        model = load_joined(files_of(folder, budget, "shared"))
        ir.save(model, folder / f"whole_{budget}.onnx")  # it points into the weights of the parts
    (folder / "done").touch()


def reducer_of(budget: int) -> Reducer:
    """Return VisionZip, or none where all tokens are left."""
    if budget == PATCHES:
        return make_reducer("none", class_token=False)
    return reducer_for_budget("visionzip", budget, PATCHES)


def files_of(folder: Path, budget: int, layout: str) -> list[Path]:
    """Return what runs one after the other for a budget."""
    if layout == "whole":
        return [folder / f"whole_{budget}.onnx"]
    return [folder / TOWER, folder / f"reducer_{budget}.onnx", folder / PROJECTOR]


def open_budget(
    folder: Path,
    budget: int,
    engine: Engine,
    layout: str,
    threads: int,
    beside: ChainedSession | None = None,
) -> Session:
    """Open a budget in a layout; ``beside`` one of the same layout."""

    def open_stage(file: Path) -> Stage:
        if engine == "ort":
            from engines.ort import OrtSession

            return OrtSession(file, threads=threads)
        from engines.openvino_session import OpenVinoSession

        return OpenVinoSession(file, threads=threads)

    files = files_of(folder, budget, layout)
    if len(files) == 1:
        return open_stage(files[0])
    if beside is not None:
        return ChainedSession(beside.shared, open_stage(files[1]), owns_shared=False)
    tower, reducer, projector = map(open_stage, files)
    return ChainedSession(SharedStages(tower, projector), reducer, owns_shared=True)


def measure_memory(
    folder: Path, engine: Engine, layout: str, threads: int, budgets: int
) -> dict[str, Any]:
    """Return the resident memory after each budget is opened and has run."""
    pixels = picture()
    begun = resident_mb()
    sessions: list[Session] = []
    grown = []
    for budget in BUDGETS[:budgets]:
        first = sessions[0] if sessions else None
        beside = first if isinstance(first, ChainedSession) else None
        sessions.append(open_budget(folder, budget, engine, layout, threads, beside))
        sessions[-1].run({"pixel_values": pixels})
        grown.append(round(resident_mb() - begun, 1))
    return {"budgets": list(BUDGETS[:budgets]), "before_mb": round(begun, 1), "grown_mb": grown}


def _in_a_process(
    folder: Path, engine: Engine, layout: Layout, threads: int, budgets: int
) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.shared_tower", "--folder", str(folder)]
    command += ["--engine", engine, "--threads", str(threads), "--layout", layout]
    command += ["--budgets", str(budgets)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure_time(folder: Path, engine: Engine, rounds: int, threads: int) -> dict[str, Any]:
    """Let both layouts take turns on one picture; compare what they return."""
    pixels = picture()
    sessions = {
        layout: open_budget(folder, BUDGETS[0], engine, layout, threads) for layout in LAYOUTS
    }
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    processor_s: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    outputs: dict[str, dict[str, Any]] = {}
    for turn in range(-1, rounds):
        for layout in LAYOUTS if turn % 2 else LAYOUTS[::-1]:
            start, start_of_cpu = time.perf_counter(), time.process_time()
            outputs[layout] = sessions[layout].run({"pixel_values": pixels})
            if turn >= 0:
                seconds[layout].append(time.perf_counter() - start)
                processor_s[layout].append(time.process_time() - start_of_cpu)
    tokens = [outputs[layout]["visual_tokens"] for layout in LAYOUTS]
    return {
        "wall": _ratio(seconds),
        "processor": _ratio(processor_s),
        "largest difference of tokens": float(np.abs(tokens[0] - tokens[1]).max()),
        "same patches": bool(
            np.array_equal(outputs["whole"]["patch_index"], outputs["shared"]["patch_index"])
        ),
    }


def _ratio(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return each layout's median and the ratio of the pairs."""
    ratios = np.array(seconds["shared"]) / np.array(seconds["whole"])
    return {
        "milliseconds": {name: round(1e3 * float(np.median(s)), 1) for name, s in seconds.items()},
        "shared / whole": round(float(np.median(ratios)), 4),
        "quartiles": [round(float(q), 4) for q in np.quantile(ratios, (0.25, 0.75))],
        "of the fastest": round(min(seconds["shared"]) / min(seconds["whole"]), 4),
    }


def measure_plans(folder: Path) -> dict[str, Any]:
    """Return the sizes of FP16 plans in both layouts, in MB."""
    files = [folder / TOWER, folder / PROJECTOR]
    files += [folder / f"reducer_{budget}.onnx" for budget in BUDGETS]
    files += files_of(folder, BUDGETS[0], "whole")
    sizes = {file.stem: build_half_plan(file) for file in files}
    shared = sum(size for name, size in sizes.items() if not name.startswith("whole"))
    whole = sizes[f"whole_{BUDGETS[0]}"]
    return {
        "plans_mb": {name: round(size, 3) for name, size in sizes.items()},
        "four budgets, whole graphs, mb": round(len(BUDGETS) * whole, 1),
        "four budgets, shared, mb": round(shared, 1),
        "four budgets / one whole graph": round(shared / whole, 3),
    }


def build_half_plan(file: Path) -> float:
    """Build a plan of a graph in FP16 and return its size in MB."""
    from engines.targets import find_target
    from engines.trt.batch_profile import token_range
    from engines.trt.builder import PlanTask, build_plan
    from graphs.float16 import convert_to_fp16

    model = ir.load(file)
    convert_to_fp16(model)
    with TemporaryDirectory() as name:
        half: ExportedGraph = write_graph(model, Path(name, file.name))
        digest = hashlib.sha256(half.file.read_bytes()).hexdigest()
        task = PlanTask(
            half.file,
            digest,
            Path(name, f"{file.stem}.plan"),
            find_target("rtx-4090"),
            "fp16",
            half.inputs,
            tokens=token_range(BUDGETS),
        )
        return build_plan(task).record.plan_bytes / 1e6


def picture() -> np.ndarray[Any, Any]:
    """Return a photograph, float32[1, 3, 336, 336]."""
    from tests.photographs import clip_pixels

    return clip_pixels(336)[:1]


def resident_mb() -> float:
    """Return the resident memory of this process."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1e3


if __name__ == "__main__":
    app()
