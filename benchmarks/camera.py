"""The camera loop on a synthetic 1080p camera: age of frames, answers per second, drops, memory.

    python -m benchmarks.camera build/pocket --seconds 60

Goals: p99 age <= 1.2 x (encode + prefill), memory growing by less than 1 % over 10,000 frames,
preprocessing of a 1080p frame <= 5 ms on one core, and the loop's own cost <= 1 ms a frame.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from engines.bundle import open_bundle
from runtime.answering import FrameAnswerer, FrameEncoder
from runtime.camera import CameraLoop, CameraOptions
from runtime.camera_parts import CameraAnswer, Said
from runtime.frames import FrameSource, Picture
from runtime.frames.frame import Capture, ReadErrors
from runtime.generate import GenerationOptions
from runtime.model import open_model
from runtime.preprocess import preprocess_batch
from runtime.vision import VisualTokens

HEIGHT, WIDTH = 1080, 1920


@dataclass
class SyntheticCamera:
    """Noise with a bright bar that moves, made once and shown at a steady rate."""

    fps: float
    frames: int
    name: str = "synthetic"
    live: bool = True

    def __post_init__(self) -> None:
        self._closed = threading.Event()
        noise = np.random.default_rng(0).integers(0, 200, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        self._pictures = [noise.copy() for _ in range(8)]
        for index, picture in enumerate(self._pictures):
            picture[:, index * 240 : index * 240 + 240] = 255

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        """Yield pictures at the camera's rate; with a rate of 0, as fast as they are taken."""
        start_s = time.monotonic()
        for index in range(self.frames):
            wait_s = start_s + index / self.fps - time.monotonic() if self.fps else 0.0
            if self._closed.wait(max(wait_s, 0.0)):
                return
            picture = self._pictures[index % 8]
            yield Capture(time.time_ns(), lambda picture=picture: picture)

    def close(self) -> None:
        """Stop at once."""
        self._closed.set()


class Free:
    """Encodes and answers at no cost, so that what is left is the loop's own."""

    def encode(self, image: Picture) -> VisualTokens:
        """Return one empty token."""
        empty = np.zeros((1, 1), np.int64)
        tokens = np.zeros((1, 1, 1), np.float32)
        return VisualTokens(tokens, np.ones(1, np.int64), empty, empty, {})

    def answer(self, visual: Any, question: str, prefilled: Any, interrupted: Any) -> Said:
        """Say nothing."""
        prefilled()
        return Said("", (), "stop_token", 1, 0.0, 0.0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure_bundle(bundle: Path, seconds: float, fps: float, max_tokens: int) -> dict[str, Any]:
    opened = open_bundle(bundle)
    with open_model(opened) as model:
        options = CameraOptions("What is in the picture?", reuse=False)
        answerer = FrameAnswerer(model, GenerationOptions(max_tokens=max_tokens))
        source = FrameSource(SyntheticCamera(fps, round(seconds * fps)))
        loop = CameraLoop(source, FrameEncoder(model.encoder), answerer, options)
        ages, costs, resident = [], [], []
        started_s = time.monotonic()
        for item in loop.answers():
            if isinstance(item, CameraAnswer):
                ages.append(item.age_ms)
                costs.append(item.seen.encode_ms + item.said.prefill_ms)
                resident.append((loop.frames, resident_bytes()))
        spent_s = time.monotonic() - started_s
        frame = np.random.default_rng(1).integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8)
        preprocess_ms = _fastest_ms(lambda: preprocess_batch(frame, opened.preprocessing))
    settled = slice(len(ages) // 10, None)  # the first answers warm up
    frames, sizes = np.array(resident[settled]).T
    slope = np.polyfit(frames, sizes, 1)[0] * 10_000 / sizes[0]
    p99_age, p50_cost = np.percentile(ages[settled], 99), np.median(costs[settled])
    return {
        "frames": loop.frames,
        "answers_per_second": round(len(ages) / spent_s, 2),
        "age_p50_ms": round(float(np.median(ages[settled])), 1),
        "age_p99_ms": round(float(p99_age), 1),
        "encode_and_prefill_p50_ms": round(float(p50_cost), 1),
        "age_p99_over_encode_and_prefill": round(float(p99_age / p50_cost), 2),
        "drops": dict(loop.drops),
        "resident_growth_per_10000_frames": round(float(slope), 4),
        "preprocess_1080p_ms": round(preprocess_ms, 2),
    }


def measure_loop(frames: int = 3000) -> float:
    """Return the processor time of the loop alone, in ms per frame, at 500 frames per second."""
    free = Free()
    source = FrameSource(SyntheticCamera(500.0, frames))
    loop = CameraLoop(source, free, free, CameraOptions("?", reuse=True))
    before_s = time.process_time()
    for _ in loop.answers():
        pass
    return (time.process_time() - before_s) / frames * 1e3


def _fastest_ms(work: Any, rounds: int = 20) -> float:
    costs_ms = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        work()
        costs_ms.append((time.perf_counter() - started_s) * 1e3)
    return min(costs_ms)


def main(
    bundle: Annotated[Path, typer.Argument(help="Directory that `export.build` wrote.")],
    seconds: Annotated[float, typer.Option(help="How long the camera runs.")] = 60.0,
    fps: Annotated[float, typer.Option(help="Its frames per second.")] = 30.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 8,
) -> None:
    """Measure the camera loop and print one JSON object."""
    report = measure_bundle(bundle, seconds, fps, max_tokens)
    report["loop_ms_per_frame"] = round(measure_loop(), 3)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
