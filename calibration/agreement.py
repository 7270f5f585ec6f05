"""How much two sets of visual tokens, or two rows of logits, agree.

Enters: NumPy arrays of one picture, the reference first. Leaves: plain numbers. Kept patches are
compared as sets and tokens by the patch they stand for, because one patch kept more or less shifts
every token after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Difference:
    """How far apart two arrays are.

    Attributes:
        max_abs: largest absolute difference.
        max_relative: ``max_abs`` over the largest absolute value of the reference.
    """

    max_abs: float
    max_relative: float


def measure_difference(reference: Array, candidate: Array) -> Difference:
    """Compare two arrays of one shape; a NaN in either makes both numbers NaN."""
    if reference.size == 0:
        return Difference(0.0, 0.0)
    exact = reference.astype(np.float64)
    largest = float(np.abs(exact - candidate.astype(np.float64)).max())
    scale = float(np.abs(exact).max())
    return Difference(largest, largest / scale if scale > 0 or np.isnan(scale) else largest)


def kept_overlap(reference: Array, candidate: Array) -> float:
    """Return intersection over union of the patches that were kept.

    Args:
        reference: int64[N]; `Reduced.origin` of one picture, -1 for no single patch.
        candidate: int64[M]; the same of the other.

    Returns:
        0 to 1; 1 where neither keeps a patch.
    """
    ours, theirs = set(candidate.tolist()) - {-1}, set(reference.tolist()) - {-1}
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0


def match_tokens(reference: Array, candidate: Array) -> tuple[Array, Array]:
    """Pair the tokens that stand for the same patch.

    Tokens that stand for no single patch (class token, merged ones) are paired in their order.

    Args:
        reference: int64[N]; `Reduced.origin` of one picture, without padding.
        candidate: int64[M]; the same of the other.

    Returns:
        Positions in the reference and in the candidate, int64[K] each.
    """
    places = _places(candidate)
    pairs = [(at, places[key]) for key, at in _places(reference).items() if key in places]
    paired = np.array(pairs, np.int64).reshape(-1, 2)
    return paired[:, 0], paired[:, 1]


def measure_cosine(reference: Array, candidate: Array) -> NDArray[np.float64]:
    """Return the cosine of each row with its counterpart.

    Args:
        reference: float[..., D].
        candidate: float[..., D].

    Returns:
        float64[...]; rows of zeros have the cosine 1 with each other and 0 with any other.
    """
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    both_zero = ~(a.any(axis=-1) | b.any(axis=-1))
    cosine = (a * b).sum(axis=-1) / np.where(lengths == 0, 1.0, lengths)
    return np.asarray(np.where(both_zero, 1.0, cosine), np.float64)


def _places(origin: Array) -> dict[tuple[int, int], int]:
    """Return where each token is: by its patch, or by its number among those without one."""
    places: dict[tuple[int, int], int] = {}
    merged = 0
    for at, patch in enumerate(origin.tolist()):
        places[(patch, merged if patch < 0 else 0)] = at
        merged += patch < 0
    return places
