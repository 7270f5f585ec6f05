"""What FP16 and INT8 change at CLIP-L/14-336 size: `python -m benchmarks.large_tower`.

Random weights with attention as uneven as training makes it, VisionZip to 64 tokens, projector of a
7B. INT8 is calibrated on eight of scikit-image's photographs, whole, mirrored and cropped, and all
precisions are judged on the four others, in ONNX Runtime, against FP32. Goal for FP16: overlap of
the kept patches >= 0.99, cosine of the matched tokens >= 0.999. INT8 is reported: random weights
say how well layers are rounded, not what a trained tower loses. Needs 8 GB of memory.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks.clip_large import (
    IMAGE_SIZE,
    PATCHES,
    clip_large_graph,
    random_clip_large,
    random_projector,
)
from calibration.agreement.graphs import compare_graphs
from calibration.scales.apply import apply_calibration
from calibration.scales.calibrate import CalibrationOptions, calibrate
from engines import cli
from engines.manifest import Preprocessing
from export.reducers import reducer_for_budget
from export.vision.to_onnx import export_onnx
from graphs.float16 import write_fp16_graph
from graphs.graph_file import write_graph
from runtime.vision.preprocess import preprocess_batch
from tests.photographs import load_photographs

Frames = list[NDArray[np.float32]]
CLIP_PREPROCESSING = Preprocessing(
    resize_height=IMAGE_SIZE,
    resize_width=IMAGE_SIZE,
    height=IMAGE_SIZE,
    width=IMAGE_SIZE,
    rescale_factor=1 / 255,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


def split_photographs() -> tuple[Frames, Frames]:
    """Return frames to calibrate on, float32[1, 3, 336, 336] each, and frames to judge by."""
    seen, held_out = [], []
    for at, picture in enumerate(load_photographs().values()):
        if at % 3 == 2:
            held_out.append(picture)
            continue
        height, width = picture.shape[:2]
        seen += [picture, np.ascontiguousarray(picture[:, ::-1])]
        seen.append(np.ascontiguousarray(picture[height // 3 :, width // 3 :]))
    return [_pixels(one) for one in seen], [_pixels(one) for one in held_out]


def _pixels(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    return preprocess_batch([picture], CLIP_PREPROCESSING)


def measure_all(folder: Path, threads: int | None) -> dict[str, dict[str, float]]:
    """Return the agreement of each precision with FP32."""
    seen, held_out = split_photographs()
    reducer = reducer_for_budget("visionzip", 64, PATCHES)
    graph = clip_large_graph(random_clip_large(), random_projector(), reducer)
    fp32 = export_onnx(graph, folder / "fp32.onnx").file
    del graph
    fp16 = write_fp16_graph(fp32, folder / "fp16.onnx").file
    found = {"fp16": asdict(compare_graphs([fp32], [fp16], held_out, threads))}
    fp16.unlink()

    def tell(line: str, done: float) -> None:
        print(f"\r{done:4.0%} {line:60}", end="", file=sys.stderr, flush=True)

    calibration = calibrate(fp32, seen, CalibrationOptions(threads=threads), progress=tell)
    print(file=sys.stderr)
    model = ir.load(fp32)
    apply_calibration(model, calibration)
    int8 = write_graph(model, folder / "int8.onnx").file
    del model
    found["int8"] = asdict(compare_graphs([fp32], [int8], held_out, threads))
    return found


def main(
    threads: cli.ThreadsOption = None,
    as_json: cli.JsonOption = False,
) -> int:
    """Compare precisions at CLIP-L/14-336 size. Exit code 1: FP16 missed its goal."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure_all(Path(folder), threads)
    if as_json:
        cli.print_json(found)
    else:
        for name, agreement in found.items():
            print(f"{name}: {', '.join(f'{key} {value:.5f}' for key, value in agreement.items())}")
    half = found["fp16"]
    return 0 if half["overlap"] >= 0.99 and half["cosine"] >= 0.999 else 1


if __name__ == "__main__":
    cli.run(main, ["python -m benchmarks.large_tower --json"])
