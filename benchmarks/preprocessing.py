"""What a 1080p frame costs before the vision graph sees it, one way beside the other.

    python -m benchmarks.preprocessing --rounds 200

Every way takes its turn in one process, so that their ratios mean something on a machine that does
other things too; the fastest round of each counts, on the clock and in processor time, which other
processes hardly change. Ends with 1 when two ways differ by a bit, or
when bands of a frame on all cores take more than 5 ms.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from engines.manifest import Preprocessing
from runtime.vision import Pixels
from runtime.vision.geometry import lay_out
from runtime.vision.parallel_resize import Bands
from runtime.vision.preprocess import PixelValues, normalise, preprocess

HEIGHT, WIDTH, SIDE = 1080, 1920, 336
GOAL_MS = 5.0


def clip_preprocessing(pad: bool) -> Preprocessing:
    """Return what LLaVA's CLIP tower wants; with ``pad``, of the whole frame on a square."""
    return Preprocessing.model_validate(
        {
            "resize_height": SIDE,
            "resize_width": SIDE,
            "height": SIDE,
            "width": SIDE,
            "rescale_factor": 1 / 255,
            "mean": (0.48145466, 0.4578275, 0.40821073),
            "std": (0.26862954, 0.26130258, 0.27577711),
            "pad_to_square": pad,
        }
    )


def preprocess_whole(picture: Pixels, preprocessing: Preprocessing) -> PixelValues:
    """Do what the checkpoint's processor does: pad, resize all of it, cut, normalise."""
    geometry = lay_out(picture.shape[0], picture.shape[1], preprocessing)
    image = Image.fromarray(picture)
    if preprocessing.pad_to_square:
        red, green, blue = (int(value * 255) for value in preprocessing.mean)
        padded = (geometry.padded_width, geometry.padded_height)
        canvas = Image.new("RGB", padded, (red, green, blue))
        canvas.paste(image, (geometry.pad_left, geometry.pad_top))
        image = canvas
    size = (geometry.resized_width, geometry.resized_height)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = geometry.crop_left, geometry.crop_top
    levels = resized.crop((left, top, left + SIDE, top + SIDE))
    return normalise(np.asarray(levels), preprocessing)


def preprocess_copy(picture: Pixels, preprocessing: Preprocessing) -> PixelValues:
    """Turn OpenCV's order round in memory first, as users do."""
    return preprocess(np.ascontiguousarray(picture[:, :, ::-1]), preprocessing)


def measure(ways: dict[str, Callable[[], PixelValues]], rounds: int) -> dict[str, Any]:
    """Return the fastest round of each way: on the clock, and of all processors together."""
    clock_s, processor_s = (dict.fromkeys(ways, float("inf")) for _ in range(2))
    for _ in range(rounds):
        for name, way in ways.items():
            started_s, before_s = time.perf_counter(), time.process_time()
            way()
            processor_s[name] = min(processor_s[name], time.process_time() - before_s)
            clock_s[name] = min(clock_s[name], time.perf_counter() - started_s)
    first = next(iter(ways))
    return {
        name: {
            "ms": round(clock_s[name] * 1e3, 2),
            "processor_ms": round(processor_s[name] * 1e3, 2),
            "ratio": round(clock_s[name] / clock_s[first], 3),
            "processor_ratio": round(processor_s[name] / processor_s[first], 3),
        }
        for name in ways
    }


def main(rounds: Annotated[int, typer.Option(help="Turns of each way.")] = 100) -> None:
    """Measure the ways and print one JSON object; what fails is told on stderr."""
    frame = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    from_opencv = np.ascontiguousarray(frame[:, :, ::-1])
    report: dict[str, Any] = {}
    failures = []
    with Bands(2) as two, Bands() as most:
        for name, pad in (("cropped", False), ("padded", True)):
            options = clip_preprocessing(pad)
            ways: dict[str, Callable[[], PixelValues]] = {
                "whole, as the processor": partial(preprocess_whole, frame, options),
                "what is kept": partial(preprocess, frame, options),
                "in 2 bands": partial(preprocess, frame, options, bands=two),
                f"in {most.threads} bands": partial(preprocess, frame, options, bands=most),
                "from OpenCV, copied": partial(preprocess_copy, from_opencv, options),
                "from OpenCV, as a view": partial(preprocess, from_opencv[:, :, ::-1], options),
            }
            _, kept, *others = (way() for way in ways.values())
            if not all(np.array_equal(other, kept) for other in others):
                failures.append(f"{name}: the ways do not come to the same values")
            report[name] = measure(ways, rounds)
        least_ms = report["cropped"][f"in {most.threads} bands"]["ms"]
    if least_ms > GOAL_MS:
        failures.append(f"a cropped frame takes {least_ms} ms, {GOAL_MS:g} at most was the goal")
    print(json.dumps(report, indent=2))
    for failure in failures:
        print(f"MISSED {failure}", file=sys.stderr)
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)
