"""Scale down all tokens of a picture in many tiles, as LLaVA-OneVision does ("anyres_max_9").

The tokens of the tiles are one large picture of features. Where it is larger than the checkpoint
allows, it is resized bilinearly before the newlines come, as transformers' `pack_image_features`
does: a new token is a mean of the four next to its middle, however many lie between them.

Only all tokens are scaled. A reducer has bounded the tokens of each square already, and what it
left lies on no grid.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.vision.layouts.sequence import PatchGrid
from runtime.vision.visual_tokens import VisualTokens

Floats = NDArray[np.float32]


def assemble_scaled_down(
    squares: VisualTokens, grid: PatchGrid, shape: tuple[int, int], newline: Floats | None
) -> VisualTokens:
    """Return the tokens of one picture, those of its tiles on a smaller grid.

    Args:
        squares: of its view and its tiles; token n of each stands for patch n.
        grid: of its tiles.
        shape: rows and columns of the smaller grid.
        newline: float32[D], what ends a row; None: nothing does.

    Returns:
        A batch of one. A token of the tiles stands for no single patch; a patch counts as merged
        into the token in whose cell its middle lies.
    """
    count, patches, width = squares.tokens.shape
    inside = grid.patches[grid.box]  # [R, C]
    tokens = resize_bilinearly(squares.tokens[1:].reshape(-1, width)[inside], shape)
    if newline is not None:
        ends = np.broadcast_to(newline, (shape[0], 1, width))
        tokens = np.concatenate([tokens, ends], axis=1)
    rows, columns = (
        (np.arange(old) * 2 + 1) * new // (2 * old)
        for old, new in zip(inside.shape, shape, strict=True)
    )
    slots = patches + rows[:, None] * tokens.shape[1] + columns  # [R, C]
    assignment = np.full(count * patches, -1, np.int64)
    assignment[:patches] = np.arange(patches)
    assignment[patches + inside] = -(slots + 2)
    sequence = np.concatenate([squares.tokens[0], tokens.reshape(-1, width)])
    origin = np.full(len(sequence), -1, np.int64)
    origin[:patches] = np.arange(patches)
    return VisualTokens(
        tokens=sequence[None],
        valid=np.array([len(sequence)]),
        origin=origin[None],
        assignment=assignment[None],
        milliseconds=squares.milliseconds,
        square_budget=patches,
    )


def resize_bilinearly(grid: Floats, shape: tuple[int, int]) -> Floats:
    """Return a grid of vectors with fewer rows and columns, float32[rows, columns, D].

    As PyTorch's `interpolate` in mode "bilinear": corners are not aligned, nothing is smoothed.

    Args:
        grid: float32[R, C, D].
        shape: rows and columns.
    """
    for axis, new in enumerate(shape):
        old = grid.shape[axis]
        middles = (np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5
        before = middles.clip(0).astype(np.int64)
        share = (middles.clip(0) - before).astype(np.float32).reshape(-1, *[1] * (2 - axis))
        behind = np.minimum(before + 1, old - 1)
        grid = grid.take(before, axis) * (1 - share) + grid.take(behind, axis) * share
    return grid
