"""Resize as Pillow does, bit by bit, but only the part that is kept, and in bands.

Pillow resizes one axis after the other with 8-bit values in between, and so does this. While the
columns are resized, the pixels of a row do not depend on other rows. Bands of rows therefore come
out as they would in one piece, and so do bands of columns while the rows are resized.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Protocol

import numpy as np
import PIL
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from PIL import Image

from runtime.vision.parallel_resize import Bands

Pixels = NDArray[np.uint8]
"""uint8[H, W, 3], RGB; perhaps a view of something larger, turned or in another order."""
Colour = tuple[int, int, int]

_ROWS, _COLUMNS = 0, 1
_WIDEST_FILTER = 3
"""Lanczos reaches three (scaled) pixels to each side."""
_LEAST_PIXELS = 1 << 17
"""Fewer pixels are resized sooner than they are shared out."""
_MOST_PIXELS = 4 << 20
"""More are never held at once."""
_CHOOSES_AXIS = int(PIL.__version__.partition(".")[0]) >= 13
"""Earlier releases always resize columns first."""


class Span:
    """Pixels ``start`` to ``stop`` of a resized axis, and the source pixels they are made from.

    Attributes:
        count: pixels that are kept.
        first: first source pixel that any of them needs.
        last: one behind the last.
        box: the source pixels that become the kept ones, counted from ``first``.
        loses: pixels that the whole axis loses.
    """

    def __init__(self, start: int, stop: int, resized: int, source: int) -> None:
        scale = source / resized
        reach = ceil(_WIDEST_FILTER * max(scale, 1.0)) + 1
        self.count = stop - start
        self.first = max(int(start * scale) - reach, 0)
        self.last = min(ceil(stop * scale) + reach, source)
        self.box = (
            max(start * scale - self.first, 0.0),
            min(stop * scale - self.first, float(self.last - self.first)),
        )
        self.loses = source - resized


@dataclass(frozen=True)
class Canvas:
    """A picture on a ground of one colour, which is never held as a whole.

    Attributes:
        picture: uint8[H, W, 3].
        colour: of the ground.
        corner: rows above the picture and columns left of it.
        shape: rows and columns of all.
    """

    picture: Pixels
    colour: Colour
    corner: tuple[int, int]
    shape: tuple[int, int]

    def cut(self, rows: Span, columns: Span) -> Canvas:
        """Return the part that the spans need."""
        (top, left), picture = self.corner, self.picture
        picture = picture[max(rows.first - top, 0) : max(rows.last - top, 0)]
        picture = picture[:, max(columns.first - left, 0) : max(columns.last - left, 0)]
        corner = max(top - rows.first, 0), max(left - columns.first, 0)
        shape = rows.last - rows.first, columns.last - columns.first
        return Canvas(picture, self.colour, corner, shape)

    def held(self, axis: int) -> slice:
        """Return which rows (axis 0) or columns (1) hold a part of the picture."""
        return slice(self.corner[axis], self.corner[axis] + self.picture.shape[axis])

    def band(self, axis: int, indices: slice) -> Image.Image:
        """Return some of those rows or columns in their whole length."""
        start, other = self.corner[axis], 1 - axis
        within = slice(indices.start - start, indices.stop - start)
        part = self.picture[within] if axis == _ROWS else self.picture[:, within]
        if part.shape[other] < self.shape[other]:
            shape = [len(part), part.shape[1], 3]
            shape[other] = self.shape[other]
            strip = np.empty(shape, np.uint8)
            strip[:] = self.colour
            held = self.held(other)
            (strip[held] if axis == _COLUMNS else strip[:, held])[:] = part
            part = strip
        return _image_from(part)


def resize(canvas: Canvas, rows: Span, columns: Span, resample: str, bands: Bands) -> Pixels:
    """Return the part of the resized canvas that the spans keep.

    Pillow 13 resizes rows first where the picture loses more than twice as many rows as columns. It
    would judge a window by the window's sizes, so each axis is resized in a call of its own.

    Args:
        canvas: what is resized.
        rows: which of its resized rows are kept.
        columns: which of its resized columns.
        resample: name of one of Pillow's filters.
        bands: threads that share the work.

    Returns:
        uint8[rows, columns, 3].
    """
    method = Image.Resampling[resample.upper()]
    axes = [(_COLUMNS, columns), (_ROWS, rows)]
    if resizes_rows_first(rows.loses, columns.loses):
        axes.reverse()
    source: _Source = canvas.cut(rows, columns)
    for axis, span in axes:
        source = _Resized(_resize_axis(source, axis, span, method, bands), canvas.colour)
    return np.asarray(source.band(_ROWS, source.held(_ROWS)))


def resizes_rows_first(lost_rows: int, lost_columns: int) -> bool:
    """Return whether this Pillow resizes the rows of a picture before its columns."""
    return _CHOOSES_AXIS and lost_rows > max(2 * lost_columns, 0)


class _Source(Protocol):
    """What one axis is resized of."""

    @property
    def colour(self) -> Colour: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def held(self, axis: int) -> slice: ...

    def band(self, axis: int, indices: slice) -> Image.Image: ...


@dataclass(frozen=True)
class _Resized:
    """What is left when one axis was resized, as Pillow holds it."""

    image: Image.Image
    colour: Colour

    @property
    def shape(self) -> tuple[int, int]:
        return self.image.height, self.image.width

    def held(self, axis: int) -> slice:
        return slice(0, self.shape[axis])

    def band(self, axis: int, indices: slice) -> Image.Image:
        if indices == self.held(axis):
            return self.image
        (height, width), start, stop = self.shape, indices.start, indices.stop
        return self.image.crop(
            (0, start, width, stop) if axis == _ROWS else (start, 0, stop, height)
        )


def _resize_axis(
    source: _Source, axis: int, span: Span, method: Image.Resampling, bands: Bands
) -> Image.Image:
    """Resize one axis, in bands of the other."""
    other = 1 - axis
    parts: list[tuple[int, Image.Image]] = []

    def work(indices: slice) -> None:
        band = source.band(other, indices)
        width, height = band.size
        box: tuple[float, float, float, float] = (0, span.box[0], width, span.box[1])
        size = (width, span.count)
        if axis == _COLUMNS:
            box, size = (span.box[0], 0, span.box[1], height), (span.count, height)
        parts.append((indices.start, band.resize(size, method, box=box)))

    held, length = source.held(other), source.shape[other]
    pixels = (held.stop - held.start) * source.shape[axis]
    if pixels:
        count = max(min(bands.threads, pixels // _LEAST_PIXELS), ceil(pixels / _MOST_PIXELS))
        bands.run(work, held, min(count, held.stop - held.start))
    if len(parts) == 1 and held == slice(0, length):
        return parts[0][1]
    # The ground needs no resizing: one colour stays that colour.
    size = (span.count, length) if axis == _COLUMNS else (length, span.count)
    whole = Image.new("RGB", size, source.colour)
    for start, part in parts:
        whole.paste(part, (0, start) if axis == _COLUMNS else (start, 0))
    return whole


def _image_from(pixels: Pixels) -> Image.Image:
    """Return pixels as Pillow holds them, read where they lie.

    A part of a picture and OpenCV's order turned round (``picture[:, :, ::-1]``) are views that
    Pillow can read: they need not be copied first.
    """
    height, width = pixels.shape[:2]
    row_bytes, pixel_bytes, order = pixels.strides
    if height < 2 or width < 2 or pixel_bytes != 3 or abs(order) != 1 or row_bytes < 3 * width:
        return Image.fromarray(np.ascontiguousarray(pixels))
    first = pixels if order == 1 else pixels[:, :, ::-1]
    data = as_strided(first, ((height - 1) * row_bytes + 3 * width,), (1,), writeable=False)
    layout = "RGB" if order == 1 else "BGR"
    return Image.frombuffer("RGB", (width, height), data, "raw", layout, row_bytes, 1)
