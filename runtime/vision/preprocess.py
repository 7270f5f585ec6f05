"""Turn a picture into `pixel_values`, as the checkpoint's own image processor does.

The result equals CLIPImageProcessor (and, with padding, LlavaImageProcessor) of transformers in its
Pillow form to 1 level of 255, and to 2 in noise of black and white. What the centre crop throws
away is not resized, so a picture of 10000 x 1 costs no more than any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engines.errors import PictureError
from engines.frame_size import FrameSize
from engines.manifest import Preprocessing
from runtime.vision.geometry import Geometry, lay_out
from runtime.vision.parallel_resize import ALONE, Bands
from runtime.vision.resize import Canvas, Pixels, Span, resize

PixelValues = NDArray[np.float32]


def preprocess(
    picture: Pixels,
    preprocessing: Preprocessing,
    out: PixelValues | None = None,
    bands: Bands = ALONE,
) -> PixelValues:
    """Turn one picture into `pixel_values`.

    Args:
        picture: RGB, uint8[H, W, 3].
        preprocessing: the bundle's.
        out: where to write, float32[3, height, width]; a new array when left out.
        bands: threads that share the work; left out, this one does it alone.

    Returns:
        float32[3, height, width].

    Raises:
        PictureError: ``picture`` is not uint8[H, W, 3] or has no pixels.
        BundleError: the preprocessing does not lead to the graph's size.
    """
    return normalise(resize_picture(picture, preprocessing, bands), preprocessing, out)


def resize_picture(picture: Pixels, preprocessing: Preprocessing, bands: Bands = ALONE) -> Pixels:
    """Pad, resize and crop one picture: all that happens to it before numbers become floats.

    Args:
        picture: RGB, uint8[H, W, 3].
        preprocessing: the bundle's.
        bands: threads that share the work; left out, this one does it alone.

    Returns:
        uint8[height, width, 3], a quarter of the bytes of `pixel_values`.

    Raises:
        PictureError: ``picture`` is not uint8[H, W, 3] or has no pixels.
        BundleError: the preprocessing does not lead to the graph's size.
    """
    check_picture(picture)
    geometry = lay_out(picture.shape[0], picture.shape[1], preprocessing)
    return _cropped(picture, geometry, preprocessing, bands)


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
    pictures: Sequence[Pixels] | Pixels, preprocessing: Preprocessing, bands: Bands = ALONE
) -> PixelValues:
    """Turn pictures, of one size or several, into a batch.

    Args:
        pictures: RGB, uint8[B, H, W, 3] or B arrays of uint8[H, W, 3].
        preprocessing: the bundle's.
        bands: threads that share the work on each picture; left out, this one does it alone.

    Returns:
        float32[B, 3, height, width].

    Raises:
        PictureError: a picture is not uint8[H, W, 3] or has no pixels.
    """
    batch = np.empty((len(pictures), 3, preprocessing.height, preprocessing.width), np.float32)
    for picture, out in zip(pictures, batch, strict=True):
        preprocess(picture, preprocessing, out, bands)
    return batch


def frames_batch(
    pictures: Sequence[Pixels] | Pixels, size: FrameSize, bands: Bands = ALONE
) -> NDArray[np.uint8]:
    """Turn pictures into what a graph takes that resizes and normalises itself.

    A single picture that has the size and lies in memory as a camera gives it is not copied. One of
    another size is resized where it has the same shape.

    Args:
        pictures: RGB, uint8[B, H, W, 3] or B arrays of uint8[H, W, 3].
        size: of the frames that the graph takes.
        bands: threads that share the work on each picture; left out, this one does it alone.

    Returns:
        uint8[B, height, width, 3].

    Raises:
        PictureError: a picture is not uint8[H, W, 3], has no pixels, or another shape.
    """
    for at, picture in enumerate(pictures):
        check_picture(picture, f"pictures[{at}]")
    frames = [_frame_of(picture, size, bands) for picture in pictures]
    return np.ascontiguousarray(frames[0])[None] if len(frames) == 1 else np.stack(frames)


def _frame_of(picture: Pixels, size: FrameSize, bands: Bands) -> Pixels:
    height, width = picture.shape[:2]
    if (height, width) == (size.height, size.width):
        return picture
    if abs(height * size.width / width - size.height) > 1:
        raise PictureError(
            f"A picture is {width} x {height}, and this bundle's graph takes camera frames of "
            f"{size.width} x {size.height} or of the same shape. Set the camera to that size, or "
            f"build the bundle with --frame {height}x{width}, or without --input uint8 for "
            "pictures of any size."
        )
    rows, columns = (
        Span(0, size.height, size.height, height),
        Span(0, size.width, size.width, width),
    )
    return resize(
        Canvas(picture, (0, 0, 0), (0, 0), (height, width)), rows, columns, "bicubic", bands
    )


def check_picture(picture: Pixels, name: str = "picture") -> None:
    """Refuse what is not uint8[H, W, 3] with at least one pixel.

    Raises:
        PictureError: with the shape and dtype that came.
    """
    shape, dtype = getattr(picture, "shape", None), getattr(picture, "dtype", None)
    if shape is None or dtype is None:
        raise PictureError(
            f"{name} is a {type(picture).__name__}, expected a NumPy array uint8[H, W, 3] in RGB "
            "order. `runtime.vision.pictures.load_picture` reads one from a file."
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


def _cropped(
    picture: Pixels, geometry: Geometry, preprocessing: Preprocessing, bands: Bands
) -> Pixels:
    """Pad, resize and crop: uint8[H, W, 3] -> uint8[height, width, 3]."""
    top, left = max(geometry.crop_top, 0), max(geometry.crop_left, 0)
    bottom = min(geometry.crop_top + geometry.crop_height, geometry.resized_height)
    right = min(geometry.crop_left + geometry.crop_width, geometry.resized_width)
    red, green, blue = (int(value * 255) for value in preprocessing.mean)
    canvas = Canvas(
        picture,
        (red, green, blue),
        corner=(geometry.pad_top, geometry.pad_left),
        shape=(geometry.padded_height, geometry.padded_width),
    )
    rows = Span(top, bottom, geometry.resized_height, geometry.padded_height)
    columns = Span(left, right, geometry.resized_width, geometry.padded_width)
    window = resize(canvas, rows, columns, preprocessing.resample, bands)
    if window.shape[:2] == (geometry.crop_height, geometry.crop_width):
        return window
    levels = np.zeros((geometry.crop_height, geometry.crop_width, 3), np.uint8)
    row, column = top - geometry.crop_top, left - geometry.crop_left
    levels[row : row + window.shape[0], column : column + window.shape[1]] = window
    return levels


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
