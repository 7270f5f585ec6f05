"""Measure how much two sets of visual tokens, or two rows of logits, agree.

Kept patches are compared as sets, and tokens by the patches they are made of, because one patch
kept more or less shifts every token after it. A NaN makes the number it goes into NaN, never a
pass. Calibration judges the average over pictures, `export.verify` the worst picture, and a golden
run copies this file to where Foveate is not installed. It therefore needs NumPy only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from runtime.vision import VisualTokens

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


@dataclass(frozen=True)
class TokenAgreement:
    """How far two sets of visual tokens of one picture agree.

    Attributes:
        overlap: intersection over union of the kept patches.
        assignment: share of the patches kept by neither that went the same way.
        cosine: the lowest of the tokens made of the same on both sides; see `match_tokens`.
        cosine_mean: their mean.
        difference: of those tokens.
        matched: how many those are.
        only_reference: patches that only the reference keeps.
        only_candidate: patches that only the other keeps.
    """

    overlap: float
    assignment: float
    cosine: float
    cosine_mean: float
    difference: Difference
    matched: int
    only_reference: tuple[int, ...]
    only_candidate: tuple[int, ...]


@dataclass(frozen=True)
class Agreement:
    """How alike two vision graphs are over some pictures.

    Attributes:
        overlap: mean of `TokenAgreement.overlap`.
        assignment: mean of `TokenAgreement.assignment`.
        cosine: mean of `TokenAgreement.cosine_mean`.
        worst: lowest `TokenAgreement.overlap`.
    """

    overlap: float
    assignment: float
    cosine: float
    worst: float


@dataclass(frozen=True)
class Gate:
    """The least agreement that is good enough.

    Attributes:
        overlap: of the kept patches, on average.
        cosine: of the tokens made of the same, on average.
        worst: of the kept patches, on any picture.
        merged: share of the other patches that are merged alike, on average.
    """

    overlap: float = 0.97
    cosine: float = 0.99
    worst: float = 0.5
    merged: float = 0.63

    def holds(self, agreement: Agreement) -> bool:
        """Return whether every measure is reached."""
        return (
            agreement.overlap >= self.overlap
            and agreement.cosine >= self.cosine
            and agreement.worst >= self.worst
            and agreement.assignment >= self.merged
        )

    def tightened(self, factor: float) -> Gate:
        """Return a gate that allows so many times this one's error on average."""
        return replace(
            self, overlap=1 - (1 - self.overlap) * factor, cosine=1 - (1 - self.cosine) * factor
        )

    def describe(self) -> str:
        """Return the measures in words."""
        return (
            f"{self.overlap:.0%} kept patches (on any picture {self.worst:.0%}), {self.merged:.0%} "
            f"of the others merged alike and a cosine of {self.cosine:g}"
        )

    def cost(self, agreement: Agreement) -> float:
        """Return the mean error of patches and tokens in multiples of what the gate allows."""
        allowed = max(1 - self.overlap, 1e-6), max(1 - self.cosine, 1e-6)
        return (1 - agreement.overlap) / allowed[0] + (1 - agreement.cosine) / allowed[1]


def average_agreement(pictures: Iterable[TokenAgreement]) -> Agreement:
    """Return the average over pictures, of which there is at least one, and the worst overlap."""
    rows = np.array([(one.overlap, one.assignment, one.cosine_mean) for one in pictures])
    overlap, assignment, cosine = rows.mean(axis=0).tolist()
    return Agreement(overlap, assignment, cosine, worst=float(rows[:, 0].min()))


def compare_visual_tokens(reference: VisualTokens, candidate: VisualTokens) -> TokenAgreement:
    """Compare what two vision graphs made of one picture, a batch of one each."""
    theirs, ours = (one.tokens[0, : one.valid[0]] for one in (reference, candidate))  # [valid, D]
    their_origin, our_origin = reference.origin[0, : len(theirs)], candidate.origin[0, : len(ours)]
    at_theirs, at_ours = match_tokens(reference, candidate)
    cosine = measure_cosine(theirs[at_theirs], ours[at_ours])
    their_patches, our_patches = _patches(their_origin), _patches(our_origin)
    return TokenAgreement(
        overlap=kept_overlap(their_origin, our_origin),
        assignment=assignment_agreement(
            (reference.assignment[0], their_origin), (candidate.assignment[0], our_origin)
        ),
        cosine=float(cosine.min()) if len(cosine) else 0.0,
        cosine_mean=float(cosine.mean()) if len(cosine) else 0.0,
        difference=measure_difference(theirs[at_theirs], ours[at_ours]),
        matched=len(cosine),
        only_reference=tuple(sorted(their_patches - our_patches)),
        only_candidate=tuple(sorted(our_patches - their_patches)),
    )


def match_tokens(reference: VisualTokens, candidate: VisualTokens) -> tuple[Array, Array]:
    """Pair the tokens of one picture that are made of the same.

    Those that stand for one patch are, whatever was added to it. Others (the class token, merged
    ones) are where the same patches went into them: one patch kept instead of another moves the
    targets of the merges behind it, and what two tokens made of other patches differ by says
    nothing of how exact the numbers are.

    Args:
        reference: a batch of one.
        candidate: the same of the other.

    Returns:
        Positions in the reference and in the candidate, int64[K] each.
    """
    places = _contents(candidate)
    pairs = [(at, places[key]) for key, at in _contents(reference).items() if key in places]
    paired = np.array(pairs, np.int64).reshape(-1, 2)
    return paired[:, 0], paired[:, 1]


def measure_difference(reference: Array, candidate: Array) -> Difference:
    """Compare two arrays of one shape; a NaN in either makes both numbers NaN."""
    if reference.size == 0:
        return Difference(0.0, 0.0)
    exact = reference.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf is the NaN that is to be told
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
    ours, theirs = _patches(candidate), _patches(reference)
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0


def assignment_agreement(reference: tuple[Array, Array], candidate: tuple[Array, Array]) -> float:
    """Return the share of the patches kept by neither side that went the same way.

    The same way: into the token that stands for the same patch, into the merged token of the same
    number, or into none.

    Args:
        reference: `Reduced.assignment`, int64[P], and `Reduced.origin`, int64[N], of one picture.
        candidate: the same of the other.

    Returns:
        0 to 1; 1 where every patch is kept by one side or both.
    """
    theirs, ours = _destinations(*reference), _destinations(*candidate)
    kept = _patches(reference[1]) | _patches(candidate[1])
    dropped = [patch for patch in range(len(theirs)) if patch not in kept]
    return sum(theirs[at] == ours[at] for at in dropped) / len(dropped) if dropped else 1.0


def relative_error(reference: Array, candidate: Array) -> float:
    """Return the length of the difference over the length of the reference; NaN stays NaN.

    Args:
        reference: float[...].
        candidate: float[...], of the same shape.
    """
    exact = reference.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = float(np.linalg.norm(candidate.astype(np.float64) - exact))
    scale = float(np.linalg.norm(exact))
    return error / scale if scale > 0 or np.isnan(scale) else error


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
    with np.errstate(invalid="ignore"):
        cosine = (a * b).sum(axis=-1) / np.where(lengths == 0, 1.0, lengths)
    return np.asarray(np.where(both_zero, 1.0, cosine), np.float64)


def _patches(origin: Array) -> set[int]:
    return set(origin.tolist()) - {-1}


def _contents(picture: VisualTokens) -> dict[Hashable, int]:
    """Return where each token is, by its patch or by what became it and what was merged into it.

    Tokens without any patch, such as the class token, are numbered in their order.
    """
    members: dict[int, list[tuple[int, bool]]] = defaultdict(list)
    for patch, slot in enumerate(picture.assignment[0].tolist()):
        if slot != -1:
            members[slot if slot >= 0 else -slot - 2].append((patch, slot >= 0))
    seen: Counter[Hashable] = Counter()
    places: dict[Hashable, int] = {}
    for at, patch in enumerate(picture.origin[0, : picture.valid[0]].tolist()):
        content: Hashable = patch if patch >= 0 else tuple(members[at])
        places[content, seen[content]] = at
        seen[content] += 1
    return places


def _destinations(assignment: Array, origin: Array) -> list[tuple[int, int] | None]:
    """Return for each patch the key of the token it is in, as `_places` has it; None for none."""
    keys = {slot: key for key, slot in _places(origin).items()}
    slots = np.where(assignment < -1, -assignment - 2, assignment)
    return [keys.get(slot) for slot in slots.tolist()]


def _places(origin: Array) -> dict[tuple[int, int], int]:
    """Return where each token is: by its patch, or by its number among those without one."""
    places: dict[tuple[int, int], int] = {}
    merged = 0
    for at, patch in enumerate(origin.tolist()):
        places[(patch, merged if patch < 0 else 0)] = at
        merged += patch < 0
    return places
