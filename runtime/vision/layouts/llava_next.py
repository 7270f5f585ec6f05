"""The layout of LLaVA-NeXT ("anyres"): the whole picture as one square, and tiles of a larger one.

The picture is scaled into the resolution that keeps most of its pixels, centred on black, and cut
into squares of the tower's size. Sizes, padding and the order of the tokens are those of
transformers' `LlavaNextImageProcessor` (in its Pillow form) and `pack_image_features`. Those of
LLaVA-OneVision are the same, but for all tokens of many tiles: see `scaled_down`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Preprocessing
from engines.picture_tiles import PictureTiles, Resolution, TileGrid
from runtime.vision.layouts.layout import Size, View
from runtime.vision.layouts.scaled_down import assemble_scaled_down
from runtime.vision.layouts.sequence import PatchGrid, assemble_tiles, tokens_inside
from runtime.vision.layouts.shared_budget import share_budget
from runtime.vision.parallel_resize import Bands
from runtime.vision.preprocess import PixelValues, check_picture, normalise, resize_picture
from runtime.vision.resize import Canvas, Pixels, Span, resize
from runtime.vision.visual_tokens import VisualTokens


@dataclass(frozen=True)
class Scaled:
    """Where a picture lies in the canvas that is cut into tiles; sizes and offsets in pixels.

    Attributes:
        canvas: height and width of all.
        height: of the scaled picture.
        width: of it.
    """

    canvas: Size
    height: int
    width: int

    @property
    def top(self) -> int:
        """Rows of black above the picture; an odd one lies below."""
        return (self.canvas[0] - self.height) // 2

    @property
    def left(self) -> int:
        """Columns of black left of it; an odd one lies right."""
        return (self.canvas[1] - self.width) // 2


def best_resolution(size: Size, resolutions: Sequence[Resolution]) -> Resolution:
    """Return the resolution in which most of a picture's pixels are left; of equals, the smallest.

    A picture is not counted as more than it has: enlarged, it would not show more.

    Args:
        size: of the picture.
        resolutions: what to choose from.
    """
    best, most, least_wasted = resolutions[0], -1, inf
    for height, width in resolutions:
        scale = min(width / size[1], height / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        wasted = height * width - shown
        if shown > most or (shown == most and wasted < least_wasted):
            best, most, least_wasted = (height, width), shown, wasted
    return best


def scaled_into(size: Size, canvas: Resolution) -> Scaled:
    """Return how a picture is scaled into a canvas, proportions kept, rounded up."""
    by_height, by_width = canvas[0] / size[0], canvas[1] / size[1]
    if by_width < by_height:
        return Scaled(canvas, min(ceil(size[0] * by_width), canvas[0]), canvas[1])
    return Scaled(canvas, canvas[0], min(ceil(size[1] * by_height), canvas[1]))


@dataclass(frozen=True)
class LlavaNext:
    """A view of the whole picture, and its tiles.

    Attributes:
        preprocessing: of the whole view; the tiles share its rescaling and normalisation.
        tiles: which resolutions there are.
        patch_rows: of a square.
        patch_columns: of a square.
        newline: float32[D], what ends a row of patches; None: nothing does.
        all_tokens: no reducer leaves any out, so those of many tiles are scaled down where the
            checkpoint does that.
    """

    preprocessing: Preprocessing
    tiles: PictureTiles
    patch_rows: int
    patch_columns: int
    newline: NDArray[np.float32] | None
    all_tokens: bool = False

    @property
    def most_squares(self) -> int:
        """The view and the tiles of the largest resolution."""
        return self.tiles.most_squares

    def grid(self, size: Size) -> TileGrid:
        """Return the tiles of a picture."""
        return self.tiles.grid_of(*best_resolution(size, self.tiles.resolutions))

    def squares(self, picture: Pixels, bands: Bands) -> list[Pixels]:
        """Return the view of it all and then the tiles, row by row, uint8[side, side, 3] each.

        Raises:
            PictureError: the picture is not uint8[H, W, 3] or has no pixels.
        """
        return [resize_picture(picture, self.preprocessing, bands), *self._cut(picture, bands)]

    def pixel_values(self, pictures: Sequence[Pixels] | Pixels, bands: Bands) -> PixelValues:
        """Return the view and then the tiles, row by row, of each picture, float32[S, 3, h, w].

        Raises:
            PictureError: a picture is not uint8[H, W, 3] or has no pixels.
        """
        for at, picture in enumerate(pictures):
            check_picture(picture, f"pictures[{at}]")
        counts = [self.grid(_size_of(picture)).squares for picture in pictures]
        side = self.tiles.side
        batch = np.empty((sum(counts), 3, side, side), np.float32)
        starts = np.cumsum([0, *counts[:-1]])
        for picture, start in zip(pictures, starts, strict=True):
            squares = self.squares(picture, bands)
            for square, out in zip(squares, batch[start:], strict=False):
                normalise(square, self.preprocessing, out)
        return batch

    def _cut(self, picture: Pixels, bands: Bands) -> list[Pixels]:
        """Return the tiles of a picture, uint8[side, side, 3] each."""
        height, width = size = _size_of(picture)
        at = scaled_into(size, best_resolution(size, self.tiles.resolutions))
        canvas = np.zeros((*at.canvas, 3), np.uint8)
        canvas[at.top : at.top + at.height, at.left : at.left + at.width] = resize(
            Canvas(picture, (0, 0, 0), (0, 0), size),
            Span(0, at.height, at.height, height),
            Span(0, at.width, at.width, width),
            self.preprocessing.resample,
            bands,
        )
        side = self.tiles.side
        return [
            canvas[row : row + side, column : column + side]
            for row in range(0, at.canvas[0], side)
            for column in range(0, at.canvas[1], side)
        ]

    def assemble(self, squares: VisualTokens, sizes: Sequence[Size]) -> VisualTokens:
        """Return the tokens of each picture in one sequence; see `sequence` and `scaled_down`."""
        pictures, start = [], 0
        for size in sizes:
            stop = start + self.grid(size).squares
            pictures.append(self._assemble_one(squares.part(slice(start, stop)), size))
            start = stop
        return VisualTokens.stacked(pictures, squares.milliseconds)

    def _assemble_one(self, squares: VisualTokens, size: Size) -> VisualTokens:
        """Return the tokens of one picture."""
        grid = self._patches(size)
        shape = self.tiles.scaled_down(*grid.shape, self.patch_rows)
        if self.all_tokens and shape != grid.shape:
            return assemble_scaled_down(squares, grid, shape, self.newline)
        if self.tiles.picture_tokens is not None:
            inside = tokens_inside(squares, grid)
            squares = share_budget(squares, inside, self.tiles.picture_tokens)
        return assemble_tiles(squares, grid, self.newline)

    def _patches(self, size: Size) -> PatchGrid:
        """Return the tiles' patches as one grid, without the rows or columns that are padding.

        As transformers' `unpad_image` counts them: in patches, from the picture's proportions.
        """
        grid = self.grid(size)
        patches = _side_by_side(grid, self.patch_rows, self.patch_columns)
        rows, columns = patches.shape
        if size[1] / size[0] > columns / rows:
            seen = int(round(size[0] * (columns / size[1]), 7))
            above = (rows - seen) // 2
            return PatchGrid(patches, above, rows - above, 0, columns)
        seen = int(round(size[1] * (rows / size[0]), 7))
        before = (columns - seen) // 2
        return PatchGrid(patches, 0, rows, before, columns - before)

    def views(self, size: Size) -> tuple[View, ...]:
        """Return the grid of the whole view and the grid of all tiles together."""
        height, width = size
        own = self.patch_rows * self.patch_columns
        whole = View(
            rows=np.linspace(0, height, self.patch_rows + 1),
            columns=np.linspace(0, width, self.patch_columns + 1),
            patches=np.arange(own).reshape(self.patch_rows, self.patch_columns),
        )
        at = scaled_into(size, best_resolution(size, self.tiles.resolutions))
        patches = _side_by_side(self.grid(size), self.patch_rows, self.patch_columns)
        rows = np.linspace(0, at.canvas[0], patches.shape[0] + 1)
        columns = np.linspace(0, at.canvas[1], patches.shape[1] + 1)
        tiles = View(
            rows=(rows - at.top) * height / at.height,
            columns=(columns - at.left) * width / at.width,
            patches=patches + own,
        )
        return whole, tiles


def _size_of(picture: Pixels) -> Size:
    return picture.shape[0], picture.shape[1]


def _side_by_side(grid: TileGrid, rows: int, columns: int) -> NDArray[np.int64]:
    """Return the patches of tiles of rows x columns where they lie, int64[R, C]."""
    numbers = np.arange(grid.rows * grid.columns * rows * columns)
    apart = numbers.reshape(grid.rows, grid.columns, rows, columns)
    laid: NDArray[np.int64] = apart.transpose(0, 2, 1, 3).reshape(grid.rows * rows, -1)
    return laid
