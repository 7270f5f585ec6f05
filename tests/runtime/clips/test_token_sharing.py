"""Sharing visual tokens among frames, for any newness, budgets and total."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import OptionError
from runtime.clips.token_sharing import share_tokens

newness_lists = st.lists(st.sampled_from([0.0, 0.0, 0.01, 0.2, 0.5, 1.0]), min_size=1, max_size=12)
budget_sets = st.lists(st.integers(1, 300), min_size=1, max_size=4, unique=True)


@given(newness_lists, budget_sets, st.integers(0, 2000))
def test_what_holds_of_every_sharing(newness: list[float], budgets: list[int], spare: int) -> None:
    total = min(budgets) + spare
    shares = share_tokens(newness, budgets, total)
    assert len(shares) == len(newness)
    assert set(shares) <= {0, *budgets}
    assert 0 < sum(shares) <= total  # at least one frame, and never too much
    for new, share in zip(newness, shares, strict=True):
        if new == 0 and max(newness) > 0:
            assert share == 0  # still frames cost nothing
        for other_new, other_share in zip(newness, shares, strict=True):
            if new > other_new:
                assert share >= other_share  # a newer frame never gets less


@pytest.mark.parametrize(
    ("newness", "total", "expected"),
    [
        ([1, 0, 0, 0], 10_000, [192, 0, 0, 0]),  # a still camera
        ([0, 0, 0], 10_000, [0, 0, 32]),  # nothing is new: the last frame
        ([1, 1, 1, 1], 10_000, [192, 192, 192, 192]),
        ([1, 0.3, 0.05, 0.2], 10_000, [192, 64, 32, 64]),  # no more than is new
        ([1, 0.3, 0.05, 0.2], 320, [192, 64, 0, 64]),
        ([1, 0.3, 0.05, 0.2], 160, [128, 32, 0, 0]),
        ([1, 1, 1, 1, 1], 100, [32, 0, 32, 0, 32]),  # equally new: spread over time
        ([1, 1, 1, 1, 1], 64, [32, 0, 0, 0, 32]),
        ([1, 1, 1], 40, [0, 0, 32]),
    ],
)
def test_sharing(newness: list[float], total: int, expected: list[int]) -> None:
    assert list(share_tokens(newness, (64, 32, 192, 128), total)) == expected


def test_with_one_graph_there_are_fewer_frames() -> None:
    assert share_tokens([1, 0.3, 0.05, 0.2], [64], 130) == (64, 64, 0, 0)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="16 visual tokens at most, and one frame takes 32"):
        share_tokens([1, 1], [64, 32], 16)
    with pytest.raises(OptionError, match="no frames"):
        share_tokens([], [64], 100)
