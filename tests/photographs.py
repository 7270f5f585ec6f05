"""Real photographs that need no download: those inside scikit-image's wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image

NAMES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


def load_photographs() -> dict[str, NDArray[np.uint8]]:
    """Return the photographs by name, uint8[H, W, 3] RGB of various sizes."""
    folder = Path(skimage.__file__).parent / "data"
    return {name: np.asarray(Image.open(folder / name).convert("RGB")) for name in NAMES}


def clip_pixels(image_size: int) -> NDArray[Any]:
    """Return all photographs as CLIP sees them, float32[12, 3, image_size, image_size]."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return np.asarray(
        processor(list(load_photographs().values()), return_tensors="np")["pixel_values"]
    )
