"""All tokens of many tiles on a smaller grid: transformers' own, at LLaVA-OneVision's shapes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionConfig
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from engines.picture_tiles import PictureTiles
from runtime.vision import VisualTokens
from runtime.vision.layouts.llava_next import LlavaNext
from runtime.vision.layouts.scaled_down import pool_squares, resize_bilinearly
from tests.runtime.vision.layouts.test_llava_next_pixels import tiled

WIDTH, PATCHES = 3, 27 * 27
NEWLINE = np.full(WIDTH, -7, np.float32)
CONFIG = LlavaOnevisionConfig()
"""Up to 36 tiles of 384 pixels, and tokens of 9."""


@pytest.mark.parametrize("shape", [(10, 13), (54, 7), (81, 80), (1, 1)])
def test_a_grid_is_resized_as_pytorch_does(shape) -> None:
    grid = np.random.default_rng(0).normal(size=(81, 108, WIDTH)).astype(np.float32)
    channels_first = torch.from_numpy(grid).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(channels_first, list(shape), mode="bilinear")
    resized = resize_bilinearly(grid, shape)
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected[0].permute(1, 2, 0).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("size", "squares", "scaled"),
    [
        ((384, 384), 2, False),
        ((480, 640), 5, False),
        ((1152, 1152), 10, False),
        ((1000, 1500), 13, False),  # 12 tiles, whose padding leaves fewer
        ((1080, 1920), 16, True),
        ((1200, 1920), 21, True),
        ((2000, 1500), 25, True),
        ((2304, 2304), 37, True),
        ((4000, 3000), 31, True),
        ((300, 4000), 7, False),
    ],
)
def test_at_true_shapes_all_tokens_are_transformers(size, squares, scaled) -> None:
    resolutions = tuple((height, width) for height, width in CONFIG.image_grid_pinpoints)
    tiles = PictureTiles(
        side=384, resolutions=resolutions, newline="newline.safetensors", most_tiles=9
    )
    cut = LlavaNext(tiled().preprocessing, tiles, 27, 27, NEWLINE, all_tokens=True)
    assert cut.grid(size).squares == squares
    tokens = np.random.default_rng(0).normal(size=(squares, PATCHES, WIDTH)).astype(np.float32)
    whole = np.tile(np.arange(PATCHES), (squares, 1))
    seen = VisualTokens(tokens, np.full(squares, PATCHES), whole, whole, {})
    packed, _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=CONFIG),
        [torch.from_numpy(tokens)],
        torch.tensor([size]),
        torch.from_numpy(NEWLINE),
        CONFIG.vision_aspect_ratio,
    )
    laid = cut.assemble(seen, [size])
    assert (laid.origin[0, PATCHES:] < 0).all() == scaled
    np.testing.assert_allclose(laid.tokens_of(0), packed[0].numpy(), atol=1e-4)
    assert len(packed[0]) <= tiles.most_tokens(PATCHES, 27, "none")


@pytest.mark.parametrize(("side", "pooled"), [(27, 14), (12, 6), (4, 2), (5, 3)])
def test_pooling_a_frame_is_that_of_torch(side: int, pooled: int) -> None:
    """LLaVA-OneVision's own: SigLIP at 384 pixels has 27 x 27 patches, 196 tokens a frame."""
    tokens = np.random.default_rng(0).normal(size=(2, side * side, 5)).astype(np.float32)
    patches = side * side
    squares = VisualTokens(
        tokens=tokens,
        valid=np.full(2, patches),
        origin=np.tile(np.arange(patches), (2, 1)),
        assignment=np.tile(np.arange(patches), (2, 1)),
        milliseconds={},
    )
    seen = pool_squares(squares, (side, side), (pooled, pooled))
    plane = torch.from_numpy(tokens).view(2, side, side, 5).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(plane, size=[pooled, pooled], mode="bilinear")
    expected = expected.permute(0, 2, 3, 1).reshape(2, pooled**2, 5)
    np.testing.assert_allclose(seen.tokens, expected.numpy(), atol=1e-5)
    assert seen.budget == patches
    cells = -seen.assignment[0].reshape(side, side) - 2
    for row in range(side):
        for column in range(side):
            in_row, in_column = divmod(int(cells[row, column]), pooled)
            assert in_row <= (row + 0.5) * pooled / side < in_row + 1
            assert in_column <= (column + 0.5) * pooled / side < in_column + 1
