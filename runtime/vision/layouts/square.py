"""The layout of LLaVA-1.5: a picture is one square."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engines.manifest import Preprocessing
from runtime.vision.geometry import lay_out
from runtime.vision.layouts.layout import Size, View
from runtime.vision.parallel_resize import Bands
from runtime.vision.preprocess import PixelValues, preprocess_batch, resize_picture
from runtime.vision.resize import Pixels
from runtime.vision.visual_tokens import VisualTokens


@dataclass(frozen=True)
class Square:
    """One square of a picture; its tokens are the picture's.

    Attributes:
        preprocessing: the bundle's.
        patch_rows: of the square.
        patch_columns: of the square.
    """

    preprocessing: Preprocessing
    patch_rows: int
    patch_columns: int

    @property
    def most_squares(self) -> int:
        """One."""
        return 1

    def squares(self, picture: Pixels, bands: Bands) -> list[Pixels]:
        """Return the one square, uint8[height, width, 3].

        Raises:
            PictureError: the picture is not uint8[H, W, 3] or has no pixels.
        """
        return [resize_picture(picture, self.preprocessing, bands)]

    def pixel_values(self, pictures: Sequence[Pixels] | Pixels, bands: Bands) -> PixelValues:
        """Return one square of each picture, float32[B, 3, height, width].

        Raises:
            PictureError: a picture is not uint8[H, W, 3] or has no pixels.
        """
        return preprocess_batch(pictures, self.preprocessing, bands)

    def assemble(self, squares: VisualTokens, sizes: Sequence[Size]) -> VisualTokens:
        """Return the tokens as they are."""
        return squares

    def views(self, size: Size) -> tuple[View, ...]:
        """Return the one grid: back through crop, resize and padding."""
        at = lay_out(*size, self.preprocessing)
        rows = np.arange(self.patch_rows + 1) * (at.crop_height / self.patch_rows)
        columns = np.arange(self.patch_columns + 1) * (at.crop_width / self.patch_columns)
        patches = np.arange(self.patch_rows * self.patch_columns)
        view = View(
            rows=np.array([at.in_picture(row, 0)[0] for row in rows]),
            columns=np.array([at.in_picture(0, column)[1] for column in columns]),
            patches=patches.reshape(self.patch_rows, self.patch_columns),
        )
        return (view,)
