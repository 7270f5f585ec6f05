"""Choose the range that INT8 spans from a histogram of absolute values.

Values beyond the range are clipped. A wide range rounds everything coarsely for the sake of a few
outliers.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["max", "percentile", "entropy", "mse"]

LEVELS = 127
"""Largest INT8 value used: ranges are symmetric, and -128 has no counterpart."""

_CANDIDATES = 128
_ENTROPY_LEVELS = 128

Counts = NDArray[np.int64]


def count_magnitudes(values: NDArray[np.float32], largest: float, bins: int) -> Counts:
    """Return how many values have a magnitude in each of `bins` equal parts of 0 to `largest`."""
    if largest <= 0:
        return np.bincount([0], [values.size], bins).astype(np.int64)
    place = np.abs(values.ravel()) * np.float32(bins / largest)
    return np.bincount(np.minimum(place.astype(np.int32), bins - 1), minlength=bins)


def find_threshold(
    counts: Counts, largest: float, method: Method, percentile: float = 99.99
) -> float:
    """Choose the magnitude that becomes the largest INT8 value.

    Args:
        counts: int64[bins]; from `count_magnitudes`.
        largest: where the last bin ends.
        method: ``max`` spans everything; ``percentile`` that share of the values; ``entropy`` loses
            the least information (Kullback-Leibler, as TensorRT's calibrator did); ``mse`` has the
            least mean squared error of rounding and clipping together.
        percentile: for the method of that name.
    """
    if method == "max" or largest <= 0 or not counts.any():
        return largest
    if method == "percentile":
        reached = np.cumsum(counts) >= percentile / 100 * counts.sum()
        return largest * float(np.argmax(reached) + 1) / len(counts)
    if method == "entropy":
        return _least_divergence(counts, largest)
    return _least_square(counts, largest)


def _least_square(counts: Counts, largest: float) -> float:
    filled = np.flatnonzero(counts)
    centres = (filled + 0.5) * (largest / len(counts))  # [F]
    thresholds = largest * np.arange(1, _CANDIDATES + 1) / _CANDIDATES
    errors = []
    for threshold in thresholds:
        scale = threshold / LEVELS
        rounded = np.minimum(np.round(centres / scale), LEVELS) * scale
        errors.append(float(counts[filled] @ (centres - rounded) ** 2))
    return float(thresholds[int(np.argmin(errors))])


def _least_divergence(counts: Counts, largest: float) -> float:
    """Return the end of the bins whose distribution survives 128 levels best.

    The distribution is cut after a bin, what lies beyond is added to that bin, and compared with
    the same bins after each run that shares a level was averaged over its filled bins.
    """
    best, chosen = np.inf, len(counts)
    tail = np.cumsum(counts[::-1])[::-1]
    step = max(1, len(counts) // _CANDIDATES)
    for end in range(_ENTROPY_LEVELS, len(counts) + 1, step):
        kept = counts[:end].astype(np.float64)
        level = np.arange(end) * _ENTROPY_LEVELS // end
        filled = kept > 0
        share = np.bincount(level, kept, _ENTROPY_LEVELS) / np.maximum(
            np.bincount(level, filled, _ENTROPY_LEVELS), 1
        )
        approximate = np.where(filled, share[level], 0.0)
        if end < len(counts):
            kept[-1] += tail[end]
        if not approximate.any():
            continue
        # A clipped tail in a bin that is empty otherwise has no counterpart: smooth a little.
        p = (kept + 1e-4) / (kept + 1e-4).sum()
        q = (approximate + 1e-4) / (approximate + 1e-4).sum()
        divergence = float((p * np.log(p / q)).sum())
        if divergence < best:
            best, chosen = divergence, end
    return largest * chosen / len(counts)
