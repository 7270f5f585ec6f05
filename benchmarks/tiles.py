"""LLaVA-NeXT at its true shape: five squares of CLIP-L/14-336 in one call, reduced or not.

Random weights, a picture of 672 x 672, a projector to 4096. The picture goes the way of a user's:
cut into squares, one call of the graph, tokens put in order with their newlines.

Claims: without reduction the 2,928 tokens are those of transformers' `pack_image_features` within
1e-4; with 64 tokens a square each square's tokens are those of the papers' path within 1e-4; with
reduction a picture takes no longer than without (ratio <= 1.0, taken within a round). Needs 8 GB.

    python -m benchmarks.tiles --rounds 3 --threads 1 --json
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from transformers import CLIPVisionModel, LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from benchmarks.clip_large import (
    IMAGE_SIZE,
    LANGUAGE_WIDTH,
    PATCHES,
    clip_large_graph,
    random_clip_large,
    random_projector,
)
from benchmarks.large_tower import CLIP_PREPROCESSING
from benchmarks.papers_path import run_tower, visionzip
from engines.ort import OrtSession
from engines.picture_tiles import PictureTiles
from export.reducers import make_reducer, reducer_for_budget
from export.vision.to_onnx import export_onnx
from runtime.vision import VisualTokens
from runtime.vision.layouts.llava_next import LlavaNext
from runtime.vision.parallel_resize import ALONE
from runtime.vision.preprocess import PixelValues
from tests.photographs import load_photographs

app = typer.Typer(add_completion=False)

SIDE = 24
RESOLUTIONS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SIZE = (672, 672)
TOKENS = 64
_WORST = 1e-4
_OUTPUTS = ("visual_tokens", "valid_count", "patch_index", "assignment")


def next_layout(newline: NDArray[np.float32]) -> LlavaNext:
    """Return the layout of LLaVA-NeXT's releases."""
    whole = CLIP_PREPROCESSING.model_copy(update={"resize": "exact", "center_crop": False})
    tiles = PictureTiles(side=IMAGE_SIZE, resolutions=RESOLUTIONS, newline="newline.safetensors")
    return LlavaNext(whole, tiles, SIDE, SIDE, newline)


class Way:
    """A graph, run as the runtime runs it.

    Args:
        file: the graph.
        layout: of the pictures.
        threads: of ONNX Runtime.
    """

    def __init__(self, file: Path, layout: LlavaNext, threads: int) -> None:
        self.session = OrtSession(file, threads=threads)
        self.layout = layout

    def squares(self, pixels: PixelValues) -> VisualTokens:
        """Return the tokens of each square, of one call."""
        out = self.session.run({"pixel_values": pixels})
        tokens, valid, origin, assignment = (out[name] for name in _OUTPUTS)
        return VisualTokens(tokens, valid, origin, assignment, {})

    def picture(self, picture: NDArray[np.uint8]) -> VisualTokens:
        """Return the tokens of a picture."""
        pixels = self.layout.pixel_values([picture], ALONE)
        size = (picture.shape[0], picture.shape[1])
        return self.layout.assemble(self.squares(pixels), [size])


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after one to warm up.")] = 5,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compare with transformers and the papers' path, then time both graphs in turns."""
    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    newline = random.standard_normal(LANGUAGE_WIDTH).astype(np.float32)
    photograph = Image.fromarray(load_photographs()["astronaut.png"])
    picture = np.asarray(photograph.resize(SIZE))
    model, projector = random_clip_large(), random_projector()
    with TemporaryDirectory() as folder:
        print("exporting two graphs of 1.2 GB ...", file=sys.stderr)
        ways = {}
        reducers = {
            "reduced": reducer_for_budget("visionzip", TOKENS, PATCHES),
            "full": make_reducer("none"),
        }
        for name, reducer in reducers.items():
            graph = clip_large_graph(model, projector, reducer)
            file = export_onnx(graph, Path(folder, f"{name}.onnx")).file
            ways[name] = Way(file, next_layout(newline), threads)
        report = _compare(ways, model, projector, picture) | _time(ways, picture, rounds)
    report["threads"] = threads
    print(json.dumps(report) if as_json else "\n".join(f"{k}: {v}" for k, v in report.items()))
    met = report["ratio"] <= 1.0 and max(report["difference"].values()) <= _WORST
    raise typer.Exit(0 if met else 1)


def _compare(
    ways: dict[str, Way], model: CLIPVisionModel, projector: nn.Module, picture: NDArray[np.uint8]
) -> dict[str, Any]:
    """Return the largest differences from transformers and from the papers' path."""
    layout = ways["full"].layout
    pixels = layout.pixel_values([picture], ALONE)  # [5, 3, 336, 336]
    features, reduced = [], []
    for square in pixels:
        print("the papers' path of a square ...", file=sys.stderr)
        run = run_tower(model, torch.from_numpy(square[None]))
        with torch.inference_mode():
            features.append(projector(run.features[:, 1:])[0])  # [P, D]
            reduced.append(projector(visionzip(run, 54, 10)[0])[0].numpy())  # [N, D]
        del run
    config = LlavaNextConfig(image_grid_pinpoints=[list(one) for one in RESOLUTIONS])
    pack: Any = LlavaNextModel.pack_image_features
    packed, _ = pack(
        _Configured(config),  # all it reads of the model
        [torch.stack(features)],
        torch.tensor([SIZE]),
        "default",
        torch.from_numpy(layout.newline),
    )
    full = ways["full"].picture(picture)
    mine = ways["reduced"].squares(pixels)
    whole = layout.assemble(mine, [SIZE])
    return {
        "squares": len(pixels),
        "visual_tokens": {"full": int(full.valid[0]), "reduced": int(whole.valid[0])},
        "difference": {
            "full": float(np.abs(full.tokens_of(0) - packed[0].numpy()).max()),
            "reduced": float(np.abs(mine.tokens - np.stack(reduced)).max()),
        },
    }


class _Configured:
    def __init__(self, config: LlavaNextConfig) -> None:
        self.config = config


def _time(ways: dict[str, Way], picture: NDArray[np.uint8], rounds: int) -> dict[str, Any]:
    """Return the milliseconds of a picture each way, and the median ratio of a round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, rounds):
        print(f"\rround {turn + 1} of {rounds}", end="", file=sys.stderr)
        for name, way in ways.items():
            started = time.perf_counter()
            way.picture(picture)
            if turn >= 0:
                times[name].append((time.perf_counter() - started) * 1e3)
    print(file=sys.stderr)
    ratios = np.array(times["reduced"]) / np.array(times["full"])
    return {
        "milliseconds": {name: round(float(np.median(ms)), 1) for name, ms in times.items()},
        "ratio": round(float(np.median(ratios)), 4),
        "ratios": ratios.round(4).tolist(),
    }


if __name__ == "__main__":
    app()
