"""Choose the range that INT8 spans from a histogram of absolute values.

Values beyond the range are clipped. A wide range rounds everything coarsely for the sake of a few
outliers.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["max", "mse"]

LEVELS = 127
"""Largest INT8 value used: ranges are symmetric, and -128 has no counterpart."""

_CANDIDATES = 128

Counts = NDArray[np.float64]


def count_magnitudes(
    values: NDArray[np.float32], largest: float, bins: int, weight: NDArray[np.float32]
) -> Counts:
    """Return how many values have a magnitude in each of `bins` equal parts of 0 to `largest`.

    Args:
        values: float32[S, K].
        largest: where the last part ends; what lies beyond is counted there.
        bins: how many parts.
        weight: float32[S]; how many rows each row stands for.
    """
    counts = np.zeros(bins)
    for each in np.unique(weight):
        rows = values[weight == each]
        if largest > 0:
            place = np.minimum(np.abs(rows) * np.float32(bins / largest), bins - 1)
            found = np.bincount(place.astype(np.int32).ravel(), minlength=bins)
        else:
            found = np.bincount([0], [rows.size], bins)
        counts += each * found
    return counts


def find_threshold(counts: Counts, largest: float, method: Method) -> float:
    """Choose the magnitude that becomes the largest INT8 value.

    Args:
        counts: float64[bins]; from `count_magnitudes`.
        largest: where the last bin ends.
        method: ``max`` spans everything; ``mse`` has the least mean squared error of rounding and
            clipping together. A percentile and the Kullback-Leibler divergence (TensorRT's
            calibrator) never kept more patches than ``max``; docs/log.md has the tables.
    """
    if method == "max" or largest <= 0 or not counts.any():
        return largest
    filled = np.flatnonzero(counts)
    centres = (filled + 0.5) * (largest / len(counts))  # [F]
    thresholds = largest * np.arange(1, _CANDIDATES + 1) / _CANDIDATES
    errors = []
    for threshold in thresholds:
        scale = threshold / LEVELS
        rounded = np.minimum(np.round(centres / scale), LEVELS) * scale
        errors.append(float(counts[filled] @ (centres - rounded) ** 2))
    return float(thresholds[int(np.argmin(errors))])
