"""The measures of agreement, on cases small enough to work out by hand."""

import math

import numpy as np
import pytest

from calibration.agreement import (
    kept_overlap,
    match_tokens,
    measure_cosine,
    measure_difference,
)


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ([-1, 3, 5], [-1, 5, 3], 1.0),
        ([-1, 3, 5], [-1, 3, 6], 1 / 3),
        ([1, 2], [3, 4], 0.0),
        ([-1, -1], [-1], 1.0),
        ([0, 1, 2, -1], [1, -1, -1, -1], 1 / 3),
    ],
)
def test_overlap_is_of_sets_of_patches(reference, candidate, expected):
    assert kept_overlap(np.array(reference), np.array(candidate)) == pytest.approx(expected)


def test_tokens_are_matched_by_patch_and_merged_ones_in_order():
    reference = np.array([-1, 4, 7, 9, -1, -1])
    candidate = np.array([-1, 7, 8, 4, -1])
    theirs, ours = match_tokens(reference, candidate)
    assert list(zip(theirs.tolist(), ours.tolist(), strict=True)) == [
        (0, 0),
        (1, 3),
        (2, 1),
        (4, 4),
    ]


def test_nothing_to_match():
    theirs, ours = match_tokens(np.array([1, 2]), np.array([3]))
    assert theirs.shape == ours.shape == (0,)


def test_difference_is_relative_to_the_largest_value_of_the_reference():
    difference = measure_difference(np.array([[1.0, -4.0]]), np.array([[1.5, -4.25]]))
    assert (difference.max_abs, difference.max_relative) == (0.5, 0.125)


def test_difference_of_zeros_nothing_and_integers():
    assert measure_difference(np.zeros(3), np.zeros(3)).max_relative == 0.0
    assert measure_difference(np.zeros(3), np.full(3, 2.0)).max_relative == 2.0
    assert measure_difference(np.zeros((0, 4)), np.zeros((0, 4))).max_abs == 0.0
    assert measure_difference(np.array([5]), np.array([3])).max_abs == 2.0


def test_a_number_that_is_none_is_not_hidden():
    for reference, candidate in (([1.0, math.nan], [1.0, 2.0]), ([1.0, 2.0], [math.nan, 2.0])):
        assert math.isnan(measure_difference(np.array(reference), np.array(candidate)).max_relative)


def test_cosine_of_rows():
    reference = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]], np.float32)
    candidate = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], np.float32)
    assert measure_cosine(reference, candidate) == pytest.approx([1.0, math.sqrt(0.5), 1.0, 0.0])
    assert math.isnan(measure_cosine(np.array([math.nan, 1.0]), np.array([1.0, 1.0])))
