"""Each visual token has the place that it would have among all of its picture's."""

from __future__ import annotations

import numpy as np
import pytest

from engines.llm_words import Positions
from export.reducers import Reducer
from runtime.language.parts import PlacedTokens
from runtime.vision import VisualTokens
from runtime.vision.places import picture_of, placed_tokens
from tests.export.reducer_cases import EVERY_REDUCER, random_tower

COLUMNS = 4


def seen(origin: list[int], assignment: list[int], valid: int | None = None) -> VisualTokens:
    count = len(origin)
    tokens = np.arange(count, dtype=np.float32)[None, :, None]
    return VisualTokens(
        tokens=tokens,
        valid=np.array([count if valid is None else valid]),
        origin=np.array([origin]),
        assignment=np.array([assignment]),
        milliseconds={},
    )


def test_a_patch_keeps_its_place_and_padding_has_none() -> None:
    visual = seen([3, 9, 14, -1], [-1] * 16, valid=3)
    placed = placed_tokens(visual, 0, COLUMNS)
    assert placed.places.tolist() == [3, 9, 14]
    assert (placed.length, len(placed)) == (16, 3)
    assert np.array_equal(placed.tokens, visual.tokens[0, :3])


def test_merged_tokens_stand_at_their_anchor_or_in_the_middle() -> None:
    """The class token, a patch, a target with two patches, and a square of four."""
    assignment = [-1] * 16
    assignment[6] = 1
    assignment[12], assignment[0], assignment[3] = 2, -4, -4
    for patch in (9, 10, 13, 14):
        assignment[patch] = -5
    placed = placed_tokens(seen([-1, 6, -1, -1], assignment), 0, COLUMNS)
    assert placed.places.tolist() == [0, 6, 12, 3 * COLUMNS + 2]


def test_all_tokens_with_the_class_token_stand_one_after_the_other() -> None:
    placed = placed_tokens(seen([-1, *range(16)], list(range(1, 17))), 0, COLUMNS)
    assert placed.places.tolist() == list(range(17))
    assert placed.length == 17


def test_compact_tokens_have_no_places() -> None:
    visual = seen([3, 9], [-1] * 16)
    compact = picture_of(visual, "compact", "equal", COLUMNS)
    assert isinstance(compact, np.ndarray)
    assert np.array_equal(compact, visual.tokens[0])


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_token_counts_for_the_patches_that_it_was_made_from(positions: Positions) -> None:
    assignment = [-1] * 16
    assignment[6] = 1
    assignment[12], assignment[0], assignment[3] = 2, -4, -4
    picture = picture_of(seen([-1, 6, -1], assignment), positions, "patches", COLUMNS)
    assert isinstance(picture, PlacedTokens)
    np.testing.assert_allclose(picture.bias, np.log([1, 1, 3]), rtol=1e-6)
    assert (picture.length, picture.places.tolist()) == (
        (3, [0, 1, 2]) if positions == "compact" else (16, [0, 6, 12])
    )


@pytest.mark.parametrize("reducer", EVERY_REDUCER, ids=lambda one: f"{one.name} {one.options}")
def test_every_reducers_tokens_have_places_in_the_picture(reducer: Reducer) -> None:
    """Those of patches have theirs; all tokens stand as they do without places."""
    reduced = reducer(random_tower(2, 64, scoring=reducer.scoring))
    arrays = (reduced.tokens, reduced.valid, reduced.origin, reduced.assignment)
    visual = VisualTokens(*(array.numpy() for array in arrays), milliseconds={})
    for at in range(2):
        placed = placed_tokens(visual, at, 8)
        if reducer.name == "none":
            assert placed.places.tolist() == list(range(len(placed.tokens)))
            assert placed.length == len(placed.tokens)
            continue
        origin = visual.origin[at, : visual.valid[at]]
        assert placed.length == 64
        assert 0 <= min(placed.places) <= max(placed.places) < 64
        assert np.array_equal(placed.places[origin >= 0], origin[origin >= 0])
        if reducer.name == "visionzip":  # all but the class token stand at a patch of their own
            assert len(set(placed.places[1:])) == len(placed.places) - 1
