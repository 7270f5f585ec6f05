"""Measure and draw where the class token looks, for the card.

    python models/pocket-llava/attention.py --count 1000 --picture models/pocket-llava/attention.png

A checkpoint enters; the statistics of its class token's attention in layer -2 on held-out scenes
leave as JSON on stdout, and a picture of scenes above their attention.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from architecture import tower_of
from layout import GRID_SIZE, IMAGE_SIZE, array_from_layout
from PIL import Image
from scene_store import SceneStore
from scenes import TEST_SEED, generate_scene
from tower_check import class_attention, measure_attention
from transformers import LlavaForConditionalGeneration

HERE = Path(__file__).resolve().parent
_SHOWN = 6


def draw_attention(images: np.ndarray, attention: np.ndarray) -> Image.Image:
    """Draw scenes in one row and, below, the same ones lit by the attention they receive.

    Args:
        images: uint8[N, IMAGE_SIZE, IMAGE_SIZE, 3].
        attention: float32[N, P].
    """
    strength = attention.reshape(-1, GRID_SIZE, GRID_SIZE)
    strength = np.sqrt(strength / strength.max((1, 2), keepdims=True))
    scale = IMAGE_SIZE // GRID_SIZE
    light = strength.repeat(scale, 1).repeat(scale, 2)[..., None]
    lit = images * (0.25 + 0.75 * light) + light * np.array([90, 60, 0], np.float32)
    rows = [np.concatenate(list(row), 1) for row in (images, lit.clip(0, 255).astype(np.uint8))]
    picture = Image.fromarray(np.concatenate(rows, 0))
    covering = Image.Quantize.MAXCOVERAGE
    return picture.quantize(256, method=covering, kmeans=2, dither=Image.Dither.NONE)


def main() -> int:
    """Read the command line, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=HERE)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(options.checkpoint, dtype=torch.float32)
    drawn = [generate_scene(TEST_SEED, index) for index in range(options.count)]
    store = SceneStore(
        np.stack([image for _, image, _ in drawn]),
        np.stack([labels for _, _, labels in drawn]),
        np.stack([array_from_layout(layout) for layout, _, _ in drawn]),
    )
    attention = class_attention(tower_of(model.eval()), store, options.count)
    print(json.dumps(measure_attention(attention, store.labels), indent=2))
    if options.picture:
        draw_attention(store.images[:_SHOWN], attention[:_SHOWN]).save(options.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
