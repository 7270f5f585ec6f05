"""The order of tokens over tiles, against plain loops over the whole picture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.picture_tiles import PictureTiles
from runtime.vision import VisualTokens
from runtime.vision.layouts.llava_next import LlavaNext
from runtime.vision.parallel_resize import ALONE
from tests.runtime.vision.layouts.test_llava_next_pixels import tiled

SIDE, WIDTH = 4, 3  # patches along a square's side, and D
NEWLINE = np.full(WIDTH, -7, np.float32)
SIZES = ((100, 100), (100, 200), (100, 300), (300, 100), (60, 200), (75, 200), (200, 130))


def layout(newline: Any = NEWLINE) -> LlavaNext:
    return tiled(newline, SIDE)


def reduced(squares: int, slots: int, seed: int, kind: str) -> VisualTokens:
    """What a reducer of a kind might leave of random squares; a token holds its square and slot."""
    random = np.random.default_rng(seed)
    patches = SIDE * SIDE
    origin = np.full((squares, slots), -1)
    assignment = np.full((squares, patches), -1)
    valid = np.full(squares, slots)
    for square in range(squares):
        merged = {"visionzip": 2, "prumerge": 1, "pool": slots, "kept": 0}[kind]
        first = int(kind == "visionzip")
        if kind in ("prumerge", "kept"):
            valid[square] = random.integers(1, slots + 1)
        kept = np.sort(random.permutation(patches)[: valid[square] - merged - first])
        slot = first + np.arange(len(kept))
        origin[square, slot] = kept
        assignment[square, kept] = slot
        free = np.flatnonzero(assignment[square] < 0)
        if kind == "pool":
            assignment[square] = -(np.arange(patches) * slots // patches + 2)
        elif merged:
            joins = random.integers(valid[square] - merged, valid[square], len(free))
            assignment[square, free] = -(joins + 2)
            targets = free[:merged] if kind == "visionzip" else []
            assignment[square, targets] = valid[square] - merged + np.arange(len(targets))
    tokens = np.arange(squares)[:, None] * 100 + np.arange(slots)
    tokens = np.where(np.arange(slots) < valid[:, None], tokens, -1)
    return VisualTokens(
        np.repeat(tokens[:, :, None], WIDTH, 2).astype(np.float32), valid, origin, assignment, {}
    )


def slots_of(assignment: np.ndarray[Any, Any], slot: int) -> list[int]:
    """The patches in a token."""
    return [p for p, a in enumerate(assignment) if slot in (a, -a - 2) and a != -1]


def expected(seen: VisualTokens, size: tuple[int, int], newlines: bool) -> list[int]:
    """The tokens in order by the rule, one patch of the picture after the other; -7 a newline."""
    grid = layout().grid(size)
    rows, columns = grid.rows * SIDE, grid.columns * SIDE
    top, bottom, left, right = 0, rows, 0, columns
    if size[1] / size[0] > columns / rows:
        top = (rows - int(round(size[0] * (columns / size[1]), 7))) // 2
        bottom = rows - top
    else:
        left = (columns - int(round(size[1] * (rows / size[0]), 7))) // 2
        right = columns - left
    number = lambda square, slot: square * 100 + slot  # noqa: E731
    sequence = [number(0, slot) for slot in range(seen.valid[0])]
    placed: dict[int, int] = {}  # square, slot of what stands at a patch of the grid
    before, behind = [], []
    for square in range(1, grid.squares):
        origin, assignment = seen.origin[square], seen.assignment[square]
        at: dict[int, int] = {}  # patch -> its place in the grid, inside the picture
        for patch in range(SIDE * SIDE):
            row = (square - 1) // grid.columns * SIDE + patch // SIDE
            column = (square - 1) % grid.columns * SIDE + patch % SIDE
            if top <= row < bottom and left <= column < right:
                at[patch] = row * columns + column
        count = seen.valid[square]
        some = any(origin[slot] >= 0 for slot in range(count))
        for slot in range(count):
            members = slots_of(assignment, slot)
            inside = [at[patch] for patch in members if patch in at]
            if origin[slot] >= 0:
                if origin[slot] in at:
                    placed[at[origin[slot]]] = number(square, slot)
            elif members and not inside:
                continue
            elif members and not some:
                placed[min(inside)] = number(square, slot)
            elif some and all(origin[s] < 0 for s in range(slot)):
                before.append(number(square, slot))
            else:
                behind.append(number(square, slot))
    for row in range(rows):
        line = [placed[p] for p in range(row * columns, (row + 1) * columns) if p in placed]
        sequence += [*line, -7] if line and newlines else line
    return sequence + before + behind


@pytest.mark.parametrize("kind", ["visionzip", "prumerge", "pool", "kept"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("newlines", [True, False])
def test_the_order_is_that_of_the_rule(kind, size, newlines) -> None:
    cut = layout(NEWLINE if newlines else None)
    for seed in range(5):
        squares = cut.grid(size).squares
        seen = reduced(squares, 8, seed, kind)
        whole = cut.assemble(seen, [size])
        assert whole.tokens[0, :, 0].tolist() == expected(seen, size, newlines)
        assert whole.valid.tolist() == [whole.tokens.shape[1]]
        assert whole.budget == 8


@pytest.mark.parametrize("kind", ["visionzip", "prumerge", "pool", "kept"])
@pytest.mark.parametrize("size", SIZES)
def test_every_token_says_which_square_and_patches_it_was_made_of(kind, size) -> None:
    cut = layout()
    squares = cut.grid(size).squares
    seen = reduced(squares, 8, 1, kind)
    whole = cut.assemble(seen, [size])
    patches = SIDE * SIDE
    assert whole.assignment.shape == (1, squares * patches)
    for place, token in enumerate(whole.tokens[0, :, 0].astype(int).tolist()):
        members = slots_of(whole.assignment[0], place)
        if token == -7:
            assert (members, whole.origin[0, place]) == ([], -1)
            continue
        square, slot = divmod(token, 100)
        assert members == [square * patches + p for p in slots_of(seen.assignment[square], slot)]
        origin = seen.origin[square, slot]
        assert whole.origin[0, place] == (square * patches + origin if origin >= 0 else -1)
    made = whole.assignment[0][whole.assignment[0] != -1]
    assert len(made) == sum(len(slots_of(whole.assignment[0], n)) for n in range(whole.valid[0]))


def test_visionzips_released_order_without_newlines() -> None:
    """Base tokens, kept patches of all tiles row by row, class tokens, contextual tokens."""
    seen = reduced(5, 8, 3, "visionzip")
    tokens = layout(None).assemble(seen, [(100, 100)]).tokens[0, :, 0].astype(int).tolist()
    assert tokens[:8] == list(range(8))
    assert tokens[-12:-8] == [100, 200, 300, 400]  # class tokens, tile by tile
    assert tokens[-8:] == [106, 107, 206, 207, 306, 307, 406, 407]
    assert len(tokens) == 40


def test_what_lies_in_the_padding_is_dropped() -> None:
    everything = VisualTokens(
        tokens=reduced(4, 16, 0, "kept").tokens,
        valid=np.full(4, 16),
        origin=np.tile(np.arange(16), (4, 1)),
        assignment=np.tile(np.arange(16), (4, 1)),
        milliseconds={},
    )
    whole = layout(None).assemble(everything, [(30, 180)])  # half of the three tiles is black
    assert whole.valid.tolist() == [16 + 24]
    rows = (whole.assignment[0, 16:] >= 0).reshape(3, SIDE, SIDE).any(axis=(0, 2))
    assert rows.tolist() == [False, True, True, False]


@pytest.mark.parametrize("size", SIZES)
def test_a_view_says_where_each_patch_is_in_the_picture(size) -> None:
    """A picture whose pixels hold their own place goes through the tiles and back."""
    height, width = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[:, :, 0] = np.linspace(0, 255, height)[:, None]
    ramp[:, :, 1] = np.linspace(0, 255, width)[None]
    cut = layout()
    pixels = cut.pixel_values([ramp], ALONE)  # [S, 3, 56, 56]
    std, mean = np.array(cut.preprocessing.std), np.array(cut.preprocessing.mean)
    levels = (pixels * std[:, None, None] + mean[:, None, None]) * 255
    means = levels.reshape(len(pixels), 3, SIDE, 14, SIDE, 14).mean(axis=(3, 5))
    means = means.transpose(0, 2, 3, 1).reshape(-1, 3)  # [S * P, 3]
    whole, tiles = cut.views(size)
    assert whole.patches.ravel().tolist() == list(range(SIDE * SIDE))
    assert sorted(tiles.patches.ravel()) == list(range(SIDE * SIDE, len(means)))
    for view in (whole, tiles):
        for (row, column), patch in np.ndenumerate(view.patches):
            top, bottom = view.rows[row], view.rows[row + 1]
            left, right = view.columns[column], view.columns[column + 1]
            if top < 0 or left < 0 or bottom > height or right > width:
                continue
            middle = (top + bottom) / 2 / height * 255, (left + right) / 2 / width * 255
            np.testing.assert_allclose(means[patch, :2], middle, atol=3)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ((672, 672), 2928),
        ((480, 640), 2340),
        ((333, 1000), 2328),
        ((1080, 1920), 1948),
        ((1920, 1080), 1968),
        ((500, 100), 1104),
    ],
)
def test_at_true_shapes_all_tokens_are_in_transformers_order(size, count) -> None:
    """Tiles of 336 pixels and 576 patches, 24 rows each."""
    import torch
    from transformers import LlavaNextConfig
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    resolutions = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    tiles = PictureTiles(side=336, resolutions=resolutions, newline="newline.safetensors")
    cut = LlavaNext(layout().preprocessing, tiles, 24, 24, NEWLINE)
    squares, patches = cut.grid(size).squares, np.arange(576)
    tokens = np.arange(squares * 576 * WIDTH, dtype=np.float32).reshape(squares, 576, WIDTH)
    whole = np.tile(patches, (squares, 1))
    seen = VisualTokens(tokens, np.full(squares, 576), whole, whole, {})
    config = LlavaNextConfig(image_grid_pinpoints=[list(one) for one in resolutions])
    packed, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [torch.from_numpy(tokens)],
        torch.tensor([size]),
        "default",
        torch.from_numpy(NEWLINE),
    )
    assert len(packed[0]) == count
    np.testing.assert_array_equal(cut.assemble(seen, [size]).tokens_of(0), packed[0].numpy())
