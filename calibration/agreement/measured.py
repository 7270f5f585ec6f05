"""Sum up the agreement of many pictures: mean, worst, and how sure the mean is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibration.agreement.token_metrics import TokenAgreement

FEWEST_PICTURES = 16
"""With fewer the interval and the worst picture say little."""

_RESAMPLES = 2000


@dataclass(frozen=True)
class Measure:
    """One measure over pictures.

    Attributes:
        mean: over all of them.
        low: where the 95 % interval of the mean begins, by bootstrap over the pictures.
        high: where it ends.
        worst: of one picture, or of one square of a picture.
    """

    mean: float
    low: float
    high: float
    worst: float


@dataclass(frozen=True)
class MeasuredAgreement:
    """How alike two graphs are on pictures that nothing was decided on.

    Attributes:
        pictures: how many.
        squares: of them all; None in older records, where a picture was one.
        overlap: of the patches that were kept.
        assignment: share of the other patches that were merged alike.
        cosine: of the tokens made of the same; of a picture, their mean.
    """

    pictures: int
    overlap: Measure
    assignment: Measure
    cosine: Measure
    squares: int | None = None


def measure_agreement(
    squares: Sequence[TokenAgreement], counts: Sequence[int] | None = None
) -> MeasuredAgreement:
    """Sum up squares, of which there is at least one.

    Args:
        squares: of one picture after the other.
        counts: how many of them each picture has; None where each has one.
    """
    counts = [1] * len(squares) if counts is None else counts
    return MeasuredAgreement(
        pictures=len(counts),
        overlap=_measure([one.overlap for one in squares], counts),
        assignment=_measure([one.assignment for one in squares], counts),
        cosine=_measure([one.cosine_mean for one in squares], counts),
        squares=len(squares),
    )


def _measure(values: Sequence[float], counts: Sequence[int]) -> Measure:
    """Return the mean over squares; squares of one picture are drawn together."""
    random = np.random.default_rng(0)
    sums = np.add.reduceat(values, np.cumsum([0, *counts[:-1]]))
    drawn = random.choice(len(counts), (_RESAMPLES, len(counts)))
    means = sums[drawn].sum(axis=1) / np.array(counts)[drawn].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Measure(float(np.mean(values)), float(low), float(high), float(np.min(values)))
