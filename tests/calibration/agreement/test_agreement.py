"""The measures of agreement, on cases small enough to work out by hand."""

import math

import numpy as np
import pytest

from calibration.agreement.token_metrics import (
    Agreement,
    assignment_agreement,
    average_agreement,
    compare_visual_tokens,
    kept_overlap,
    match_tokens,
    measure_cosine,
    measure_difference,
    relative_error,
)
from runtime.vision import VisualTokens


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


def tokens(origin, assignment, rows=None):
    origin = np.array([origin])
    rows = np.eye(8, dtype=np.float32)[: origin.shape[1]] if rows is None else rows
    return VisualTokens(
        tokens=np.asarray(rows, np.float32)[None],
        valid=np.array([origin.shape[1]]),
        origin=origin,
        assignment=np.array([assignment]),
        milliseconds={},
    )


# Six patches: the class token, patches 1 and 4, and two merged tokens made from 0 and 3.
ORIGIN, ASSIGNMENT = [-1, 1, 4, -1, -1], [3, 1, -5, 4, 2, -6]


def test_equal_tokens_agree_in_everything():
    agreement = compare_visual_tokens(tokens(ORIGIN, ASSIGNMENT), tokens(ORIGIN, ASSIGNMENT))
    assert (agreement.overlap, agreement.assignment, agreement.cosine) == (1.0, 1.0, 1.0)
    assert (agreement.matched, agreement.difference.max_abs) == (5, 0.0)
    assert agreement.only_reference == agreement.only_candidate == ()


def test_two_patches_swapped_are_kept_all_the_same_but_their_tokens_differ():
    swapped = tokens([-1, 4, 1, -1, -1], [3, 2, -5, 4, 1, -6])
    agreement = compare_visual_tokens(tokens(ORIGIN, ASSIGNMENT), swapped)
    assert (agreement.overlap, agreement.assignment) == (1.0, 1.0)
    assert agreement.cosine == 0.0
    assert agreement.cosine_mean == pytest.approx(3 / 5)


def test_another_patch_kept_is_named():
    other = tokens([-1, 1, 5, -1, -1], [3, 1, -5, 4, -6, 2])
    agreement = compare_visual_tokens(tokens(ORIGIN, ASSIGNMENT), other)
    assert agreement.overlap == pytest.approx(1 / 3)
    assert (agreement.only_reference, agreement.only_candidate) == ((4,), (5,))
    assert agreement.assignment == 1.0  # patches 0, 2 and 3, which neither keeps
    assert agreement.matched == 3  # the class token, patch 1, and what is made of 0 and 2
    assert agreement.cosine == 1.0


@pytest.mark.parametrize(
    ("origin", "assignment", "expected"),
    [
        (ORIGIN, ASSIGNMENT, [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]),
        # The same in other slots: the merged ones are found by what is in them.
        ([-1, 4, -1, 1, -1], [4, 3, -6, 2, 1, -4], [(0, 0), (1, 3), (2, 1), (3, 4), (4, 2)]),
        # Patch 2 went to the other one, so neither is made of the same.
        (ORIGIN, [3, 1, -6, 4, 2, -6], [(0, 0), (1, 1), (2, 2)]),
        # Made of the same two patches, but the other one is the target.
        (ORIGIN, [-5, 1, 3, 4, 2, -6], [(0, 0), (1, 1), (2, 2), (4, 4)]),
        ([5], [-1, -1, -1, -1, -1, 0], []),
    ],
)
def test_tokens_made_of_the_same_are_matched(origin, assignment, expected):
    theirs, ours = match_tokens(tokens(ORIGIN, ASSIGNMENT), tokens(origin, assignment))
    assert theirs.dtype == ours.dtype == np.int64
    assert list(zip(theirs.tolist(), ours.tolist(), strict=True)) == expected


def test_padding_is_not_matched():
    padded = tokens([1, 4, -1, -1], [2, 0, -4, -1, 1, -4])
    padded.valid[0] = 3
    theirs, ours = match_tokens(padded, padded)
    assert theirs.tolist() == ours.tolist() == [0, 1, 2]


def test_the_average_is_over_pictures_whatever_they_have_in_common():
    same = compare_visual_tokens(tokens(ORIGIN, ASSIGNMENT), tokens(ORIGIN, ASSIGNMENT))
    nothing = compare_visual_tokens(tokens([1, 2], [-1, 0, 1, -1]), tokens([0], [0, -1, -1, -1]))
    assert average_agreement([same, nothing]) == Agreement(0.5, 1.0, 0.5, worst=0.0)
    broken = tokens(ORIGIN, ASSIGNMENT, np.full((5, 8), np.nan))
    poisoned = compare_visual_tokens(tokens(ORIGIN, ASSIGNMENT), broken)
    assert math.isnan(average_agreement([same, poisoned]).cosine)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ([3, 1, -5, 4, 2, -6], 1.0),
        ([3, 1, -6, 4, 2, -6], 3 / 4),  # patch 2 went to the other token
        ([3, 1, -1, 4, 2, -1], 2 / 4),  # patches 2 and 5 are in none
        ([4, 1, -6, 3, 2, -5], 0.0),
    ],
)
def test_assignment_is_of_patches_that_neither_side_keeps(assignment, expected):
    origin = np.array(ORIGIN)
    given = (np.array(ASSIGNMENT), origin), (np.array(assignment), origin)
    assert assignment_agreement(*given) == expected


def test_assignment_follows_the_tokens_number_not_its_slot():
    fewer = (np.array([2, 1, -4, 3, -5, -5]), np.array([-1, 1, -1, -1]))  # patch 4 is not kept
    assert assignment_agreement((np.array(ASSIGNMENT), np.array(ORIGIN)), fewer) == 1.0
    everything = (np.arange(6), np.arange(6))
    assert assignment_agreement(everything, everything) == 1.0


def test_relative_error():
    assert relative_error(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(0.1)
    assert relative_error(np.zeros(2), np.array([3.0, 4.0])) == 5.0
    assert relative_error(np.zeros(2), np.zeros(2)) == 0.0
    assert math.isnan(relative_error(np.array([1.0, math.nan]), np.ones(2)))
    assert math.isnan(relative_error(np.ones(2), np.array([1.0, math.nan])))
