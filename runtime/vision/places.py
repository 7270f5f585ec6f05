"""Where visual tokens would stand if all of their picture's were there, and what each counts for.

A token made from one patch has that patch's place in reading order. A token that merges several has
the place of the patch it was made around: VisionZip's target, the kept patch of PruMerge, SCOPE and
DivPrune. One that has no such patch (pooling, PruMerge's sum of the rest) has the place nearest to
the mean of its patches. The class token stands where the picture begins, with the first patch.
Where every patch and the class token are there, they stand one after the other.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engines.llm_words import Positions, VisualWeights
from runtime.language.parts import Picture, PlacedTokens
from runtime.vision.visual_tokens import VisualTokens


def picture_of(
    visual: VisualTokens, positions: Positions, weights: VisualWeights, columns: int
) -> Picture:
    """Return an image's visual tokens as a prompt takes them.

    Args:
        visual: a batch of one.
        positions: where they will stand.
        weights: how much they will count in attention.
        columns: of the grid of patches.
    """
    if positions == "compact" and weights == "equal":
        return visual.tokens_of(0)
    placed = placed_tokens(visual, 0, columns)
    if positions == "compact":
        placed = replace(placed, places=np.arange(len(placed)), length=len(placed))
    if weights == "equal":
        return placed
    return replace(placed, bias=np.log(patches_of(visual)[0, : len(placed)]).astype(np.float32))


def patches_of(visual: VisualTokens) -> NDArray[np.int64]:
    """Return how many patches each token was made from, int64[B, N]; at least 1."""
    counts = np.ones(visual.origin.shape, np.int64)
    for of_image, assignment in zip(counts, visual.assignment, strict=True):
        slots = np.where(assignment >= 0, assignment, -assignment - 2)  # -1 in none
        found = np.bincount(slots[slots >= 0], minlength=len(of_image))
        of_image[:] = found.clip(min=1)
    return counts


def placed_tokens(visual: VisualTokens, at: int, columns: int) -> PlacedTokens:
    """Return the real tokens of one image of a batch, each in its place and counting as one.

    Args:
        visual: the batch.
        at: which image.
        columns: of the grid of patches.
    """
    tokens, patches = visual.tokens_of(at), visual.assignment.shape[1]
    equal = np.zeros(len(tokens), np.float32)
    if len(tokens) > patches:
        return PlacedTokens(tokens, np.arange(len(tokens)), len(tokens), equal)
    origin = visual.origin[at, : len(tokens)]
    places = [
        int(patch) if patch >= 0 else _place_of(slot, visual.assignment[at], columns)
        for slot, patch in enumerate(origin)
    ]
    return PlacedTokens(tokens, np.array(places, np.int64), patches, equal)


def _place_of(slot: int, assignment: NDArray[np.int64], columns: int) -> int:
    """Return the place of a token that stands for no single patch.

    Args:
        slot: its number.
        assignment: int64[P], see `VisualTokens`.
        columns: of the grid of patches.
    """
    made_from = np.flatnonzero(assignment == slot)
    if len(made_from):
        return int(made_from[0])
    merged = np.flatnonzero(assignment == -(slot + 2))
    if not len(merged):
        return 0
    row, column = (merged // columns).mean(), (merged % columns).mean()
    return int(np.floor(row + 0.5)) * columns + int(np.floor(column + 0.5))
