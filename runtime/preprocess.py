"""A picture becomes `pixel_values`, as the checkpoint's own image processor would make them.

Enters: uint8 RGB. Leaves: normalised float32 of the size the vision graph takes. Equal to
CLIPImageProcessor (and, with padding, LlavaImageProcessor) of transformers in its Pillow form to 1
level of 255, without transformers and without resizing what the centre crop throws away: a picture
of 10000 x 1 costs no more than any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.errors import PictureError
from engines.manifest import Preprocessing
from runtime.geometry import Geometry, lay_out

PixelValues = NDArray[np.float32]
Pixels = NDArray[np.uint8]

_WIDEST_FILTER = 3  # Lanczos reaches three (scaled) pixels to each side
_STRIP_PIXELS = 4 << 20


def preprocess(
    picture: Pixels, preprocessing: Preprocessing, out: PixelValues | None = None
) -> PixelValues:
    """Turn one picture into `pixel_values`.

    Args:
        picture: RGB, uint8[H, W, 3].
        preprocessing: the bundle's.
        out: where to write, float32[3, height, width]; a new array when left out.

    Returns:
        float32[3, height, width].

    Raises:
        PictureError: ``picture`` is not uint8[H, W, 3] or has no pixels.
        BundleError: the preprocessing does not lead to the graph's size.
    """
    return normalise(resize_picture(picture, preprocessing), preprocessing, out)


def resize_picture(picture: Pixels, preprocessing: Preprocessing) -> Pixels:
    """Pad, resize and crop one picture: all that happens to it before numbers become floats.

    Args:
        picture: RGB, uint8[H, W, 3].
        preprocessing: the bundle's.

    Returns:
        uint8[height, width, 3], a quarter of the bytes of `pixel_values`.

    Raises:
        PictureError: ``picture`` is not uint8[H, W, 3] or has no pixels.
        BundleError: the preprocessing does not lead to the graph's size.
    """
    check_picture(picture)
    geometry = lay_out(picture.shape[0], picture.shape[1], preprocessing)
    return _cropped(picture, geometry, preprocessing)


def normalise(
    levels: Pixels, preprocessing: Preprocessing, out: PixelValues | None = None
) -> PixelValues:
    """Turn a picture that has its final size into `pixel_values`.

    Args:
        levels: from `resize_picture`, uint8[height, width, 3].
        preprocessing: the bundle's.
        out: where to write, float32[3, height, width]; a new array when left out.

    Returns:
        float32[3, height, width].
    """
    table = _normalised_levels(preprocessing.rescale_factor, preprocessing.mean, preprocessing.std)
    if out is None:
        out = np.empty((3, *levels.shape[:2]), np.float32)
    for channel in range(3):
        np.take(table[channel], levels[:, :, channel], out=out[channel], mode="clip")
    return out


def preprocess_batch(
    pictures: Sequence[Pixels] | Pixels, preprocessing: Preprocessing
) -> PixelValues:
    """Turn pictures, of one size or several, into a batch.

    Args:
        pictures: RGB, uint8[B, H, W, 3] or B arrays of uint8[H, W, 3].
        preprocessing: the bundle's.

    Returns:
        float32[B, 3, height, width].

    Raises:
        PictureError: a picture is not uint8[H, W, 3] or has no pixels.
    """
    batch = np.empty((len(pictures), 3, preprocessing.height, preprocessing.width), np.float32)
    for picture, out in zip(pictures, batch, strict=True):
        preprocess(picture, preprocessing, out)
    return batch


def check_picture(picture: Pixels, name: str = "picture") -> None:
    """Refuse what is not uint8[H, W, 3] with at least one pixel.

    Raises:
        PictureError: with the shape and dtype that came.
    """
    shape, dtype = getattr(picture, "shape", None), getattr(picture, "dtype", None)
    if shape is None or dtype is None:
        raise PictureError(
            f"{name} is a {type(picture).__name__}, expected a NumPy array uint8[H, W, 3] in RGB "
            "order. `runtime.pictures.load_picture` reads one from a file."
        )
    if len(shape) == 3 and shape[2] == 3 and dtype == np.uint8 and min(shape) > 0:
        return
    got = f"{dtype}[{', '.join(map(str, shape))}]"
    advice = "It needs at least one pixel."
    if dtype != np.uint8:
        advice = "Scale it to 0..255 and convert it with `.astype(np.uint8)`."
    elif len(shape) == 2:
        advice = "Repeat a greyscale picture: `np.repeat(picture[:, :, None], 3, axis=2)`."
    elif len(shape) == 4:
        advice = "Give pictures one by one, or a batch to `VisionEncoder.encode`."
    elif len(shape) == 3 and shape[0] == 3:
        advice = "Move the channels last: `picture.transpose(1, 2, 0)`."
    elif len(shape) == 3 and shape[2] == 4:
        advice = "Drop the alpha channel: `picture[:, :, :3]`."
    raise PictureError(f"{name} is {got}, expected uint8[H, W, 3] in RGB order. {advice}")


def _cropped(picture: Pixels, geometry: Geometry, preprocessing: Preprocessing) -> Pixels:
    """Pad, resize and crop: uint8[H, W, 3] -> uint8[height, width, 3]."""
    top, left = max(geometry.crop_top, 0), max(geometry.crop_left, 0)
    bottom = min(geometry.crop_top + geometry.crop_height, geometry.resized_height)
    right = min(geometry.crop_left + geometry.crop_width, geometry.resized_width)
    resample = Image.Resampling[preprocessing.resample.upper()]
    if picture.shape[:2] == (geometry.padded_height, geometry.padded_width):
        columns = _Span(left, right, geometry.resized_width, geometry.padded_width)
        rows = _Span(top, bottom, geometry.resized_height, geometry.padded_height)
        window = _resize(picture, rows, columns, resample)
    else:
        colour = np.array([int(value * 255) for value in preprocessing.mean], np.uint8)
        window = _resize_padded(picture, geometry, colour, resample)[top:bottom, left:right]
    if window.shape[:2] == (geometry.crop_height, geometry.crop_width):
        return window
    levels = np.zeros((geometry.crop_height, geometry.crop_width, 3), np.uint8)
    row, column = top - geometry.crop_top, left - geometry.crop_left
    levels[row : row + window.shape[0], column : column + window.shape[1]] = window
    return levels


class _Span:
    """Pixels ``start`` to ``stop`` of a resized axis, and the source pixels they are made from."""

    def __init__(self, start: int, stop: int, resized: int, source: int) -> None:
        scale = source / resized
        reach = ceil(_WIDEST_FILTER * max(scale, 1.0)) + 1
        self.count = stop - start
        self.whole = self.count == resized
        self.first = max(int(start * scale) - reach, 0)
        self.last = min(ceil(stop * scale) + reach, source)
        self.box = (
            max(start * scale - self.first, 0.0),
            min(stop * scale - self.first, float(self.last - self.first)),
        )


def _resize(picture: Pixels, rows: _Span, columns: _Span, resample: Image.Resampling) -> Pixels:
    """Resize only what ends up in the spans; cutting first also keeps Pillow's copy small.

    Columns go first, as Pillow does it for a picture that shrinks or grows as a whole. Left alone,
    Pillow 13 may choose rows first from the shape of the window, and other values would clip.
    """
    source = picture[rows.first : rows.last, columns.first : columns.last]
    image = Image.fromarray(np.ascontiguousarray(source))
    if columns.whole and rows.whole:
        return np.asarray(image.resize((columns.count, rows.count), resample))
    across = (columns.box[0], 0, columns.box[1], image.height)
    image = image.resize((columns.count, image.height), resample, box=across)
    down = (0, rows.box[0], image.width, rows.box[1])
    return np.asarray(image.resize((image.width, rows.count), resample, box=down))


def _resize_padded(
    picture: Pixels, geometry: Geometry, colour: Pixels, resample: Image.Resampling
) -> Pixels:
    """Resize the picture as if it were padded, without ever holding the padded square.

    Pillow resizes columns first, then rows, with 8-bit values in between; so do we, in strips, and
    the rows of padding are added in between: columns of one colour stay that colour.
    """
    height, width = picture.shape[:2]
    across = _Span(0, geometry.resized_width, geometry.resized_width, geometry.padded_width)
    down = _Span(0, geometry.resized_height, geometry.resized_height, geometry.padded_height)
    narrow = np.empty((geometry.padded_height, across.count, 3), np.uint8)
    narrow[:] = colour
    strip_rows = max(1, _STRIP_PIXELS // geometry.padded_width)
    for first in range(0, height, strip_rows):
        strip = picture[first : first + strip_rows]
        if geometry.padded_width > width:
            padded = np.empty((len(strip), geometry.padded_width, 3), np.uint8)
            padded[:] = colour
            padded[:, geometry.pad_left : geometry.pad_left + width] = strip
            strip = padded
        rows = _Span(0, len(strip), len(strip), len(strip))
        start = geometry.pad_top + first
        narrow[start : start + len(strip)] = _resize(strip, rows, across, resample)
    columns = _Span(0, across.count, across.count, across.count)
    return _resize(narrow, down, columns, resample)


@lru_cache(maxsize=8)
def _normalised_levels(
    rescale_factor: float, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> NDArray[np.float32]:
    """Return what each of the 256 levels becomes, float32[3, 256].

    In the processor's own order and precision: rescaled in float64, normalised in float32.
    """
    levels = (np.arange(256, dtype=np.float64) * rescale_factor).astype(np.float32)
    means, stds = np.array(mean, np.float32), np.array(std, np.float32)
    return (levels[None, :] - means[:, None]) / stds[:, None]
