"""Scale down all tokens of a picture in many tiles, and of a clip's frame, as LLaVA-OneVision does.

The tokens of the tiles are one large picture of features. Where it is larger than the checkpoint
allows ("anyres_max_9"), it is resized bilinearly before the newlines come, as transformers'
`pack_image_features` does: a new token is a mean of the four next to its middle, however many lie
between them. The tokens of a frame are always resized so, as in its `apply_pooling`.

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
    slots = patches + _cells((inside.shape[0], inside.shape[1]), shape, tokens.shape[1])
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


def pool_squares(
    squares: VisualTokens, grid: tuple[int, int], shape: tuple[int, int]
) -> VisualTokens:
    """Return all tokens of squares on a smaller grid, each square by itself.

    Args:
        squares: token n of each stands for patch n.
        grid: rows and columns of their patches.
        shape: of the smaller grid.

    Returns:
        As many squares. A token stands for no single patch; a patch counts as merged into the token
        in whose cell its middle lies.
    """
    count, patches, width = squares.tokens.shape
    pooled = [resize_bilinearly(one.reshape(*grid, width), shape) for one in squares.tokens]
    slots = _cells(grid, shape, shape[1]).ravel()
    size = shape[0] * shape[1]
    return VisualTokens(
        tokens=np.stack(pooled).reshape(count, size, width),
        valid=np.full(count, size),
        origin=np.full((count, size), -1, np.int64),
        assignment=np.tile(-(slots + 2), (count, 1)),
        milliseconds=squares.milliseconds,
        square_budget=patches,
    )


def _cells(old: tuple[int, int], new: tuple[int, int], stride: int) -> NDArray[np.int64]:
    """Return in which cell of a smaller grid the middle of each cell of a grid lies, int64[R, C].

    Args:
        old: rows and columns of the grid.
        new: of the smaller one.
        stride: from one of its rows to the next.
    """
    rows, columns = (
        (np.arange(before) * 2 + 1) * after // (2 * before)
        for before, after in zip(old, new, strict=True)
    )
    cells: NDArray[np.int64] = rows[:, None] * stride + columns
    return cells


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
