"""Convert a Bayer mosaic, one colour per pixel, to RGB by bilinear interpolation.

Each missing colour is the rounded mean of the nearest pixels that have it, with mirrored edges.
FFmpeg's own conversion is not used. It splits a picture among its threads and copies instead of
interpolating where the parts meet, so its result depends on the number of CPUs, and a part of one
row aborts the process.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mosaic = NDArray[np.uint8]

PATTERNS = ("rggb", "bggr", "gbrg", "grbg")
"""Colours of the upper left four pixels, row by row."""

_BESIDE = ((0, -1), (0, 1))
_ABOVE_AND_BELOW = ((-1, 0), (1, 0))
_DIAGONAL = ((-1, -1), (-1, 1), (1, -1), (1, 1))


def rgb_from_mosaic(mosaic: Mosaic, pattern: str) -> NDArray[np.uint8]:
    """Interpolate the colours that each pixel lacks.

    Args:
        mosaic: uint8[H, W], at least 2 x 2; the rows may be padded.
        pattern: one of `PATTERNS`.

    Returns:
        uint8[H, W, 3].
    """
    height, width = mosaic.shape
    mirrored = np.pad(mosaic, 1, mode="reflect").astype(np.uint16)  # keeps each colour's places
    rgb = np.empty((height, width, 3), np.uint8)

    def mean(row: int, column: int, neighbours: tuple[tuple[int, int], ...]) -> NDArray[np.uint16]:
        """Return the mean around every second pixel of every second row, from a corner on."""
        total = sum(
            mirrored[
                1 + row + down : 1 + height + down : 2, 1 + column + right : 1 + width + right : 2
            ]
            for down, right in neighbours
        )
        return (total + len(neighbours) // 2) // len(neighbours)  # type: ignore[return-value]

    for place, colour in enumerate(pattern):
        row, column = divmod(place, 2)
        here = rgb[row::2, column::2]  # [H / 2, W / 2, 3], a view
        here[..., "rgb".index(colour)] = mosaic[row::2, column::2]
        if colour == "g":
            beside = pattern[2 * row + 1 - column]
            here[..., "rgb".index(beside)] = mean(row, column, _BESIDE)
            here[..., "br".index(beside) * 2] = mean(row, column, _ABOVE_AND_BELOW)
        else:
            here[..., 1] = mean(row, column, _BESIDE + _ABOVE_AND_BELOW)
            here[..., "br".index(colour) * 2] = mean(row, column, _DIAGONAL)
    return rgb
