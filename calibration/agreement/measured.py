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
        worst: of one picture.
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
        overlap: of the patches that were kept.
        assignment: share of the other patches that were merged alike.
        cosine: of the tokens made of the same; of a picture, their mean.
    """

    pictures: int
    overlap: Measure
    assignment: Measure
    cosine: Measure


def measure_agreement(pictures: Sequence[TokenAgreement]) -> MeasuredAgreement:
    """Sum up pictures, of which there is at least one."""
    return MeasuredAgreement(
        pictures=len(pictures),
        overlap=_measure([one.overlap for one in pictures]),
        assignment=_measure([one.assignment for one in pictures]),
        cosine=_measure([one.cosine_mean for one in pictures]),
    )


def _measure(values: Sequence[float]) -> Measure:
    random = np.random.default_rng(0)
    means = random.choice(np.array(values), (_RESAMPLES, len(values))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Measure(float(np.mean(values)), float(low), float(high), float(np.min(values)))
