"""Squares of LLaVA-NeXT: the pixels of transformers' own image processor, for every proportion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from engines.errors import PictureError
from engines.manifest import Preprocessing
from engines.picture_tiles import PictureTiles
from runtime.vision.layouts.llava_next import LlavaNext, best_resolution, scaled_into
from runtime.vision.parallel_resize import ALONE, Bands
from tests.photographs import load_photographs

SIDE = 56
PINPOINTS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SIZES = (
    *((56, 56), (112, 112), (57, 55), (40, 40), (300, 300), (1, 1), (2, 3)),
    *((200, 400), (201, 400), (400, 200), (399, 201), (100, 301), (301, 100), (480, 640)),
    *((640, 480), (720, 1280), (37, 900), (900, 37), (3, 500), (500, 3), (111, 113), (61, 173)),
)


def tiled(newline: Any = None, patches: int = 8) -> LlavaNext:
    """A layout of squares of 56 pixels."""
    preprocessing = Preprocessing(
        resize="exact",
        resize_height=SIDE,
        resize_width=SIDE,
        center_crop=False,
        height=SIDE,
        width=SIDE,
        rescale_factor=1 / 255,
        mean=MEAN,
        std=STD,
    )
    tiles = PictureTiles(side=SIDE, resolutions=PINPOINTS, newline="llm/newline.safetensors")
    return LlavaNext(preprocessing, tiles, patches, patches, newline)


def picture_of(height: int, width: int) -> np.ndarray[Any, Any]:
    photograph = Image.fromarray(load_photographs()["astronaut.png"])
    return np.asarray(photograph.resize((width, height)))


@pytest.fixture(scope="module")
def processor() -> Any:
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[list(one) for one in PINPOINTS],
        image_mean=list(MEAN),
        image_std=list(STD),
    )


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_image_processors(processor: Any, size: tuple[int, int]) -> None:
    picture = picture_of(*size)
    expected = processor(images=Image.fromarray(picture), return_tensors="np")
    pixels = tiled().pixel_values([picture], ALONE)
    assert expected["image_sizes"].tolist() == [list(size)]
    np.testing.assert_allclose(pixels, expected["pixel_values"][0], atol=1e-5)


def test_a_batch_holds_the_squares_of_each_picture_in_turn() -> None:
    pictures = [picture_of(200, 400), picture_of(300, 300)]
    with Bands(2) as bands:
        batch = tiled().pixel_values(pictures, bands)
    alone = [tiled().pixel_values([one], ALONE) for one in pictures]
    assert [len(one) for one in alone] == [3, 5]
    np.testing.assert_array_equal(batch, np.concatenate(alone))


def test_the_best_resolution_is_transformers_for_every_proportion() -> None:
    random = np.random.default_rng(0)
    real = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    for size in np.exp(random.uniform(0, 9, (500, 2))).astype(int) + 1:
        height, width = map(int, size)
        wanted = select_best_resolution((height, width), [list(one) for one in real])
        assert best_resolution((height, width), real) == wanted, size


def test_a_picture_is_centred_and_an_odd_row_lies_below() -> None:
    at = scaled_into((100, 301), (56, 168))
    assert (at.height, at.width, at.top, at.left) == (56, 168, 0, 0)
    at = scaled_into((100, 333), (56, 168))
    assert (at.height, at.width, at.top, at.left) == (51, 168, 2, 0)
    pixels = tiled().pixel_values([np.full((100, 333, 3), 255, np.uint8)], ALONE)
    black = pixels[2, 0, :, 0] < 0
    assert np.flatnonzero(~black).tolist() == list(range(2, 53))


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(PictureError, match=r"pictures\[1\] is float32\[4, 4, 3\]"):
        tiled().pixel_values([picture_of(9, 9), np.zeros((4, 4, 3), np.float32)], ALONE)
