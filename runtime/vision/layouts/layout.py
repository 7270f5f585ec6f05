"""The interface of a picture layout: a picture becomes squares, and their tokens one sequence.

The tower and the reducers see a batch of squares and know nothing of layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.vision.parallel_resize import Bands
from runtime.vision.preprocess import PixelValues
from runtime.vision.resize import Pixels
from runtime.vision.visual_tokens import VisualTokens

Size = tuple[int, int]
"""Height and width of a picture, in pixels."""


@dataclass(frozen=True)
class View:
    """A grid of patches as it lies over a picture.

    Attributes:
        rows: float64[R + 1]; the edges of its rows in the picture, in pixels. A crop or padding
            puts them inside or outside of it.
        columns: float64[C + 1]; the edges of its columns.
        patches: int64[R, C]; where each patch is in `VisualTokens.assignment`.
    """

    rows: NDArray[np.float64]
    columns: NDArray[np.float64]
    patches: NDArray[np.int64]


class Layout(Protocol):
    """How pictures become squares, and what the tower makes of the squares becomes a sequence."""

    @property
    def most_squares(self) -> int:
        """Squares of one picture, at most."""

    def squares(self, picture: Pixels, bands: Bands) -> list[Pixels]:
        """Return the squares of a picture, uint8[height, width, 3] each, the view of it all first.

        Args:
            picture: RGB, uint8[H, W, 3].
            bands: threads that share the work.

        Raises:
            PictureError: it is not uint8[H, W, 3] or has no pixels.
        """

    def pixel_values(self, pictures: Sequence[Pixels] | Pixels, bands: Bands) -> PixelValues:
        """Return the squares of all pictures one after the other, float32[S, 3, height, width].

        Args:
            pictures: RGB, uint8[B, H, W, 3] or B arrays of uint8[H, W, 3].
            bands: threads that share the work on each picture.

        Raises:
            PictureError: a picture is not uint8[H, W, 3] or has no pixels.
        """

    def assemble(self, squares: VisualTokens, sizes: Sequence[Size]) -> VisualTokens:
        """Return the tokens of each picture, a batch of them.

        Args:
            squares: of all squares that `pixel_values` returned.
            sizes: of the pictures they were cut from.
        """

    def views(self, size: Size) -> tuple[View, ...]:
        """Return how the patches lie over a picture, the coarsest view first."""
