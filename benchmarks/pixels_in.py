"""What a graph that takes camera frames saves and changes, beside one that takes pixels.

    python -m benchmarks.pixels_in --frame 1080x1920 --rounds 20
    python -m benchmarks.pixels_in --scaled 378x672 --bundle build/pocket --pictures 40

Both graphs are the bundled checkpoint's, FP32 on ONNX Runtime. They take turns in one process, so
that ratios mean something on a machine that does other things too. `cpu_ms` is what the CPU does
before the graph; on a CPU the resize moves into the graph and costs more there, on a GPU it is the
GPU's. Agreement is over 50 windows of photographs. With `--scaled`, 1080p frames are made smaller
first, as a Jetson's scaler does it, and compared with the processor on the whole frame; with
`--bundle` also in the answers about drawn pictures, enlarged to the height of a frame.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from calibration.agreement.graphs import tokens_of
from calibration.agreement.token_metrics import compare_visual_tokens
from engines.bundle import open_bundle
from engines.frame_size import FrameSize, frame_size_from_text
from engines.manifest import Preprocessing
from engines.ort import OrtSession
from export.checkpoint.llava import open_checkpoint
from export.reducers import reducer_for_budget
from export.vision.to_onnx import trace_graph
from export.vision.vision_module import build_vision_module
from graphs.frame_input import take_frames
from graphs.graph_file import write_graph
from runtime.model import Model, open_model
from runtime.vision import Pixels, VisualTokens
from runtime.vision.preprocess import frames_batch, preprocess_batch
from tests.photographs import load_photographs

POCKET = "models/pocket-llava"
CAMERA = FrameSize(1080, 1920)
WINDOWS = 50
MOST_ERROR, MOST_CPU_MS = 1e-3, 1.0
FILTERS = {
    "bilinear, two taps": Image.Resampling.BILINEAR,
    "bilinear, all pixels": Image.Resampling.BILINEAR,
    "bicubic, all pixels": Image.Resampling.BICUBIC,
}
"""How a scaler may make frames small. Two taps: without looking at the pixels between them."""


class Graphs:
    """The graph that takes pixels and those that take frames, opened."""

    def __init__(self, folder: Path, sizes: set[FrameSize], threads: int, tokens: int) -> None:
        checkpoint = open_checkpoint(POCKET)
        self.preprocessing: Preprocessing = checkpoint.preprocessing
        reducer = reducer_for_budget("visionzip", tokens, checkpoint.patch_side**2)
        module = build_vision_module(checkpoint, reducer)
        file = write_graph(trace_graph(module), folder / "pixels.onnx").file
        self.pixels = OrtSession(file, threads=threads)
        self.frames = {}
        for size in sizes:
            model = trace_graph(module)
            take_frames(model, self.preprocessing, size)
            named = write_graph(model, folder / f"{size}.onnx").file
            self.frames[size] = OrtSession(named, threads=threads)

    def from_pixels(self, frame: Pixels) -> VisualTokens:
        """Encode on the way that a graph takes pixels."""
        return tokens_of(
            self.pixels.run({"pixel_values": preprocess_batch([frame], self.preprocessing)})
        )

    def from_frame(self, frame: Pixels, size: FrameSize) -> VisualTokens:
        """Encode on the way that a graph takes frames."""
        return tokens_of(self.frames[size].run({"frames": frames_batch([frame], size)}))


def windows(size: FrameSize, count: int) -> list[Pixels]:
    """Return windows of photographs, enlarged where they are smaller, uint8[H, W, 3] each."""
    random = np.random.default_rng(0)
    photographs = [Image.fromarray(one) for one in load_photographs().values()]
    found = []
    for at in range(count):
        image = photographs[at % len(photographs)]
        scale = max(size.height / image.height, size.width / image.width, 1.0)
        scale *= random.uniform(1.0, 1.5)
        image = image.resize((int(image.width * scale) + 1, int(image.height * scale) + 1))
        top = int(random.integers(0, image.height - size.height + 1))
        left = int(random.integers(0, image.width - size.width + 1))
        found.append(np.asarray(image.crop((left, top, left + size.width, top + size.height))))
    return found


def measure_time(graphs: Graphs, size: FrameSize, rounds: int) -> dict[str, Any]:
    """Return the fastest round of each way, before the graph and with it."""
    (frame,) = windows(size, 1)
    ways: dict[str, Callable[[], Any]] = {
        "pixels cpu": lambda: preprocess_batch([frame], graphs.preprocessing),
        "frames cpu": lambda: frames_batch([frame], size),
        "pixels all": lambda: graphs.from_pixels(frame),
        "frames all": lambda: graphs.from_frame(frame, size),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            best[name] = min(best[name], (time.perf_counter() - started) * 1e3)
    return {
        "cpu_ms": {"pixels": round(best["pixels cpu"], 3), "frames": round(best["frames cpu"], 3)},
        "saved_cpu_ms": round(best["pixels cpu"] - best["frames cpu"], 3),
        "all_ms": {"pixels": round(best["pixels all"], 2), "frames": round(best["frames all"], 2)},
        "all_ratio": round(best["frames all"] / best["pixels all"], 3),
    }


def compare(pairs: list[tuple[VisualTokens, VisualTokens]]) -> dict[str, Any]:
    """Return how alike the second of each pair is to the first."""
    kept, errors, overlaps = [], [], []
    for wanted, got in pairs:
        kept.append(bool(np.array_equal(wanted.origin, got.origin)))
        overlaps.append(compare_visual_tokens(wanted, got).overlap)
        error = np.linalg.norm(got.tokens - wanted.tokens) / np.linalg.norm(wanted.tokens)
        errors.append(float(error))
    return {
        "pictures": len(pairs),
        "same_kept_sets": sum(kept),
        "kept_overlap": round(float(np.mean(overlaps)), 4),
        "largest_token_error": float(f"{max(errors):.3g}"),
        "mean_token_error": float(f"{np.mean(errors):.3g}"),
    }


def scale_down(frame: Pixels, size: FrameSize, how: str) -> Pixels:
    """Make a frame small as a camera's scaler does."""
    image = Image.fromarray(frame)
    if "two taps" in how:
        step_x, step_y = image.width / size.width, image.height / size.height
        affine = (step_x, 0, 0, 0, step_y, 0)
        return np.asarray(
            image.transform((size.width, size.height), Image.Transform.AFFINE, affine, FILTERS[how])
        )
    return np.asarray(image.resize((size.width, size.height), FILTERS[how]))


def measure_answers(
    graphs: Graphs, bundle: Path, size: FrameSize, pictures: int, folder: Path
) -> dict[str, Any]:
    """Ask about drawn pictures, seen as whole frames and as frames made small first."""
    asked: dict[str, list[tuple[str, str]]] = {}
    for line in (folder / "questions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        asked.setdefault(row["image"], []).append((row["question"], row["answer"]))
    right: dict[str, list[bool]] = {name: [] for name in ("whole frame", *FILTERS)}
    said: dict[str, list[str]] = {name: [] for name in right}
    with open_model(open_bundle(bundle)) as model:
        for name in list(asked)[:pictures]:
            frame = _frame_of(folder / name)
            seen = {"whole frame": graphs.from_pixels(frame)}
            for how in FILTERS:
                seen[how] = graphs.from_frame(scale_down(frame, size, how), size)
            for question, answer in asked[name]:
                for how, tokens in seen.items():
                    text = _ask(model, tokens, question)
                    said[how].append(text)
                    right[how].append(text == answer)
    return {
        how: {
            "questions": len(right[how]),
            "right_percent": round(100 * float(np.mean(right[how])), 2),
            "same_answers_percent": round(
                100 * float(np.mean(np.array(said[how]) == np.array(said["whole frame"]))), 2
            ),
        }
        for how in right
    }


def _frame_of(file: Path) -> Pixels:
    """Put a drawn square into the middle of a camera's frame."""
    side = CAMERA.height
    frame = Image.new("RGB", (CAMERA.width, CAMERA.height), (127, 127, 127))
    square = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    frame.paste(square, ((CAMERA.width - side) // 2, 0))
    return np.asarray(frame)


def _ask(model: Model, tokens: VisualTokens, question: str) -> str:
    timed = replace(tokens, milliseconds={"preprocess": 0.0, "encode": 0.0})
    return model.answer_about([timed], question).text.strip()


def main(
    frame: Annotated[str, typer.Option(help="Height and width of the camera's frames.")] = (
        "1080x1920"
    ),
    scaled: Annotated[
        str, typer.Option(help="Also frames made small to this first, such as 378x672.")
    ] = "",
    bundle: Annotated[
        Path | None, typer.Option(help="Whose language model answers; a build of the checkpoint.")
    ] = None,
    pictures: Annotated[int, typer.Option(help="How many drawn pictures are asked about.")] = 100,
    folder: Annotated[Path, typer.Option(help="Where they are.")] = Path(POCKET) / "test",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way.")] = 20,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    tokens: Annotated[int, typer.Option(help="Visual tokens.")] = 64,
) -> None:
    """Print one JSON object; what misses its goal is told on stderr, with exit code 1."""
    size = frame_size_from_text(frame)
    small = frame_size_from_text(scaled) if scaled else None
    report: dict[str, Any] = {}
    with TemporaryDirectory() as temporary:
        sizes = {size} | ({small} if small else set())
        graphs = Graphs(Path(temporary), sizes, threads, tokens)
        report["time"] = {str(one): measure_time(graphs, one, rounds) for one in sizes}
        views = windows(size, WINDOWS)
        wanted = [graphs.from_pixels(view) for view in views]
        got = [graphs.from_frame(view, size) for view in views]
        report["agreement"] = compare(list(zip(wanted, got, strict=True)))
        if small is not None:
            report["scaled"] = {}
            for how in FILTERS:
                seen = [graphs.from_frame(scale_down(view, small, how), small) for view in views]
                report["scaled"][how] = compare(list(zip(wanted, seen, strict=True)))
            if bundle is not None:
                report["answers"] = measure_answers(graphs, bundle, small, pictures, folder)
    print(json.dumps(report, indent=2))
    failures = []
    if report["agreement"]["same_kept_sets"] < WINDOWS:
        failures.append(f"{report['agreement']['same_kept_sets']} of {WINDOWS} kept sets are equal")
    if report["agreement"]["largest_token_error"] > MOST_ERROR:
        failures.append(f"tokens differ by {report['agreement']['largest_token_error']:g}")
    cpu_ms = report["time"][str(size)]["cpu_ms"]["frames"]
    if cpu_ms > MOST_CPU_MS:
        failures.append(f"the CPU takes {cpu_ms} ms a frame, {MOST_CPU_MS:g} at most was the goal")
    for failure in failures:
        print(f"MISSED {failure}", file=sys.stderr)
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)
