"""The benchmark of positions: where tokens stand in it, and its table."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import positions
from benchmarks.packed_answers import POCKET, Examination, Layout
from runtime.vision import VisualTokens
from runtime.vision.places import patches_of


@pytest.fixture(scope="module")
def examination() -> Examination:
    return Examination(POCKET, POCKET / "test", pictures=2)


def test_places_and_patches_of_tokens() -> None:
    """The class token, a patch, and a patch with two merged into it."""
    seen = VisualTokens(
        tokens=np.zeros((1, 3, 4), np.float32),
        valid=np.array([3]),
        origin=np.array([[-1, 2, -1]]),
        assignment=np.array([[-1, 2, 1, -4, -4, -1, -1, -1, -1]]),
        milliseconds={},
    )
    places, length = positions.places_of(seen, 3)
    assert (places.tolist(), length) == ([[0, 2, 1]], 9)
    assert patches_of(seen).tolist() == [[1, 1, 3]]


def test_a_layout_of_consecutive_tokens_changes_nothing_and_others_do(
    examination: Examination,
) -> None:
    tokens = np.random.default_rng(0).normal(size=(2, 6, 128)).astype(np.float32)
    valid = np.array([6, 6])
    places = np.tile(np.arange(6), (2, 1))
    none = np.zeros((2, 6), np.float32)
    plain = examination.right_answers(tokens, valid)
    same = examination.right_answers(tokens, valid, Layout(places, 6, none))
    np.testing.assert_array_equal(same, plain)
    hidden = Layout(places, 6, none - 1e4)  # nobody sees a token
    blind = examination.right_answers(tokens, valid, hidden)
    other = examination.right_answers(tokens[:, ::-1].copy(), valid, hidden)
    np.testing.assert_array_equal(blind, other)


def test_the_table_compares_with_compact_on_the_same_questions(examination: Examination) -> None:
    count = len(examination.types)
    right = np.ones(count, bool)
    wrong = right.copy()
    wrong[: count // 2] = False
    rows = [
        positions.Measured(16, "scope", "compact", wrong),
        positions.Measured(16, "scope", "original", right),
    ]
    table = positions.table_from_rows(rows, examination)
    assert f"{count:,} questions about 2 pictures" in table
    points = 100 * (count // 2) / count
    assert "| 16 | scope | original | 100.0%" in table
    assert f"| +{points:.1f} (" in table
