"""One budget over the squares of a picture, against plain loops, and what holds whatever it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import OptionError
from runtime.vision import VisualTokens
from runtime.vision.layouts.llava_next import LlavaNext
from runtime.vision.layouts.sequence import tokens_inside
from runtime.vision.layouts.shared_budget import share_budget
from tests.runtime.vision.layouts.test_llava_next_pixels import tiled
from tests.runtime.vision.layouts.test_sequence import NEWLINE, SIDE, SIZES, WIDTH, slots_of

PATCHES = SIDE * SIDE
SETTINGS = settings(max_examples=80, deadline=None)


def layout(total: int | None, newlines: bool = True) -> LlavaNext:
    """Pictures in tiles of 4 x 4 patches."""
    cut = tiled(NEWLINE if newlines else None, SIDE)
    return replace(cut, tiles=cut.tiles.model_copy(update={"picture_tokens": total}))


def ranked(squares: int, slots: int, seed: int, merged: bool = False) -> VisualTokens:
    """What a reducer that weighs might leave; a token holds its square and slot, worth often ties.

    With ``merged``, the other patches joined one of the tokens, and there is no order.
    """
    random = np.random.default_rng(seed)
    valid = random.integers(1, slots + 1, squares)
    origin = np.full((squares, slots), -1)
    assignment = np.full((squares, PATCHES), -1)
    order, worth = np.full((squares, slots), -1), np.zeros((squares, slots), np.float32)
    for square, count in enumerate(valid):
        kept = np.sort(random.permutation(PATCHES)[:count])
        origin[square, :count] = kept
        if merged:
            assignment[square] = -(random.integers(0, count, PATCHES) + 2)
        assignment[square, kept] = np.arange(count)
        order[square, :count] = random.permutation(count)
        falling = np.sort(random.integers(0, 5, count))[::-1] / 4
        worth[square, :count] = falling[order[square, :count]]
    tokens = np.arange(squares)[:, None] * 100 + np.arange(slots)
    tokens = np.where(np.arange(slots) < valid[:, None], tokens, -1)
    return VisualTokens(
        np.repeat(tokens[:, :, None], WIDTH, 2).astype(np.float32),
        valid,
        origin,
        assignment,
        {},
        order=None if merged else order,
        worth=worth,
    )


def numbers(seen: VisualTokens) -> list[int]:
    """The real tokens of a batch, as square * 100 + slot; -7 a newline."""
    return [int(token) for at in range(len(seen.tokens)) for token in seen.tokens_of(at)[:, 0]]


def expected(seen: VisualTokens, cut: LlavaNext, size: tuple[int, int], total: int) -> list[int]:
    """The tokens that stay by the rule: one at a time the best that is left."""
    grid = cut._patches(size)
    left = []
    for square in range(len(seen.tokens)):
        for slot in range(seen.valid[square]):
            place = grid.places()[(square - 1) * PATCHES + seen.origin[square, slot]]
            if square and place < 0:
                continue  # in the padding
            rank = slot if seen.order is None else seen.order[square, slot]
            left.append((-seen.worth[square, slot], square, rank, square * 100 + slot))
    stay = []
    while left and len(stay) < total:
        best = min(left)
        left.remove(best)
        stay.append(best[-1])
    return sorted(stay)


cases = st.tuples(
    st.sampled_from(SIZES), st.integers(1, PATCHES), st.integers(0, 2**16), st.booleans()
)


@SETTINGS
@given(cases, st.integers(1, 80))
def test_what_stays_is_worth_most(case, total) -> None:
    size, slots, seed, merged = case
    cut = layout(total)
    seen = ranked(cut.grid(size).squares, slots, seed, merged)
    whole = cut.assemble(seen, [size])
    kept = sorted(number for number in numbers(whole) if number != -7)
    assert kept == expected(seen, cut, size, total)
    assert len(kept) <= total
    assert whole.valid[0] <= cut.tiles.most_tokens(slots, SIDE, "scope")
    assert whole.budget == slots


@SETTINGS
@given(cases, st.integers(1, 80))
def test_what_stays_of_a_square_is_the_beginning_of_its_ranking(case, total) -> None:
    size, slots, seed, _ = case
    cut = layout(total)
    seen = ranked(cut.grid(size).squares, slots, seed)
    inside = tokens_inside(seen, cut._patches(size))
    shared = share_budget(seen, inside, total)
    for square, count in enumerate(shared.valid):
        ranks = np.sort(seen.order[square][inside[square]])
        assert sorted(shared.order[square, :count]) == ranks[:count].tolist()
        # Still in their spatial order, and padding behind.
        assert (np.diff(shared.origin[square, :count]) > 0).all()
        assert (shared.origin[square, count:] == -1).all()
        assert not shared.tokens[square, count:].any()
        assert not shared.worth[square, count:].any()


@SETTINGS
@given(cases)
def test_a_budget_of_all_or_more_changes_nothing(case) -> None:
    size, slots, seed, merged = case
    plain = layout(None)
    seen = ranked(plain.grid(size).squares, slots, seed, merged)
    wanted = plain.assemble(seen, [size])
    inside = int(tokens_inside(seen, plain._patches(size)).sum())
    for total in (inside, inside + 1, 10_000):
        got = layout(total).assemble(seen, [size])
        for field in ("tokens", "valid", "origin", "assignment"):
            np.testing.assert_array_equal(getattr(got, field), getattr(wanted, field))
    if inside > 1:
        fewer = layout(inside - 1, newlines=False).assemble(seen, [size])
        assert fewer.valid.tolist() == [inside - 1]


def test_padding_takes_nothing_of_the_budget() -> None:
    """Half of the three tiles is black, and a reducer thought that it is worth most."""
    size, cut = (30, 180), layout(20, newlines=False)
    every = np.tile(np.arange(PATCHES), (4, 1))
    seen = ranked(4, PATCHES, 0)
    seen = replace(seen, valid=np.full(4, PATCHES), origin=every, assignment=every, order=every)
    places = cut._patches(size).places().reshape(3, PATCHES)
    worth = np.ones((4, PATCHES), np.float32)
    worth[1:][places < 0] = 9
    whole = cut.assemble(replace(seen, worth=worth), [size])
    assert whole.valid.tolist() == [20]
    of_tiles = whole.origin[0][whole.origin[0] >= PATCHES] - PATCHES
    assert len(of_tiles) and (places.ravel()[of_tiles] >= 0).all()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_patches_say_in_which_token_they_are_and_those_left_out_in_none(size, merged) -> None:
    cut = layout(9)
    squares = cut.grid(size).squares
    seen = ranked(squares, 8, 3, merged)
    whole = cut.assemble(seen, [size])
    left = np.ones(squares * PATCHES, bool)
    for place, token in enumerate(whole.tokens[0, :, 0].astype(int).tolist()):
        members = slots_of(whole.assignment[0], place)
        if token == -7:
            assert (members, whole.origin[0, place]) == ([], -1)
            continue
        square, slot = divmod(token, 100)
        assert members == [square * PATCHES + p for p in slots_of(seen.assignment[square], slot)]
        assert whole.origin[0, place] == square * PATCHES + seen.origin[square, slot]
        assert whole.assignment[0, whole.origin[0, place]] == place
        left[members] = False
    assert (whole.assignment[0][left] == -1).all()
    assert left.any()


def test_a_square_of_floor_gives_its_share_to_one_that_shows_much() -> None:
    seen = ranked(2, 6, 0)
    slots = np.tile(np.arange(6), (2, 1))
    worth = np.array([[9, 0.1, 0.1, 0.1, 0.1, 0.1], [5, 4, 3, 2, 1, 0.5]], np.float32)
    seen = replace(seen, valid=np.full(2, 6), order=slots, worth=worth)
    assert share_budget(seen, np.ones((2, 6), bool), 6).valid.tolist() == [1, 5]


def test_tokens_of_unknown_worth_are_refused() -> None:
    seen = replace(ranked(2, 6, 0), worth=None)
    with pytest.raises(OptionError, match="does not say what a token is worth"):
        share_budget(seen, np.ones((2, 6), bool), 6)
