"""Convert ROS image messages to uint8[H, W, 3] RGB pictures.

The fields may come from `sensor_msgs/Image` or `sensor_msgs/CompressedImage`, of ROS 1 or 2, live
or recorded. They are checked before C code sees them. FFmpeg converts YUV.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.errors import SourceError
from runtime.frames.decoding import import_av
from runtime.frames.demosaic import PATTERNS, rgb_from_mosaic
from runtime.picture_limits import MAX_FILE_BYTES, size_problem
from runtime.vision import Pixels

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class _Form:
    """What an encoding is, and what it must keep to.

    Attributes:
        convert: from uint8[H, W * bytes_per_pixel] and W to RGB.
        bytes_per_pixel: as the name says.
        smallest: pixels a picture must have along each side.
        even_width: two pixels in a row share their colour.
    """

    convert: Callable[[Bytes, int], Pixels]
    bytes_per_pixel: int
    smallest: int = 1
    even_width: bool = False


def image_from_message(message: Any) -> Pixels:
    """Return the picture of an Image message: its height, width, encoding, step and data.

    The fields are checked here, all of them, before C code sees any.

    Raises:
        SourceError: the encoding is not known, the size is not possible, or the data is too short
            for it.
    """
    height, width, step = int(message.height), int(message.width), int(message.step)
    encoding = str(message.encoding).lower()
    form = _FORMS.get(encoding)
    if form is None:
        raise SourceError(
            f"An image message has the encoding {message.encoding!r:.99}, which is not one of "
            f"{', '.join(sorted(_FORMS))}. Republish the topic as rgb8."
        )
    if problem := size_problem(width, height):
        raise SourceError(f"An image message says {problem}. Its publisher is at fault.")
    if min(width, height) < form.smallest or (form.even_width and width % 2):
        expected = "an even width" if form.even_width else f"at least {form.smallest} pixels a side"
        raise SourceError(
            f"An image message says {width}x{height} {encoding}, expected {expected}. Its "
            "publisher is at fault."
        )
    data = np.frombuffer(message.data, np.uint8)
    row_bytes = width * form.bytes_per_pixel
    if step < row_bytes or data.size < step * height:
        raise SourceError(
            f"An image message says {width}x{height} {message.encoding} with {step} bytes a row, "
            f"and has {data.size} bytes. Its publisher is at fault."
        )
    rows = data[: step * height].reshape(height, step)[:, :row_bytes]  # [H, W * bytes]
    if encoding.endswith("16") and bool(message.is_bigendian):
        rows = rows.reshape(height, width, 2)[..., ::-1].reshape(height, row_bytes)
    return form.convert(rows, width)


def image_from_compressed_message(message: Any) -> Pixels:
    """Return the picture of a CompressedImage message: JPEG, PNG or WebP.

    Raises:
        SourceError: it is compressed depth, which is no picture.
        PictureError: the data is damaged.
    """
    from runtime.vision.pictures import picture_from_bytes

    if "compresseddepth" in str(message.format).lower():
        raise SourceError(
            f"A compressed image message has the format {message.format!r}: depth, not a picture. "
            "Choose a colour topic."
        )
    data = memoryview(message.data)
    if data.nbytes > MAX_FILE_BYTES:
        raise SourceError(
            f"A compressed image message has {data.nbytes:,} bytes, expected at most "
            f"{MAX_FILE_BYTES:,}. Its publisher is at fault."
        )
    return picture_from_bytes(data.tobytes(), "A compressed image message")


def stamp_ns(message: Any) -> int:
    """Return the time in a message's header, in ns; 0 where the publisher did not set it."""
    stamp = message.header.stamp
    seconds = getattr(stamp, "sec", None)
    if seconds is None:  # ROS 1, by genpy's names
        return int(stamp.secs) * 1_000_000_000 + int(stamp.nsecs)
    return int(seconds) * 1_000_000_000 + int(stamp.nanosec)


def _colour(step: int) -> Callable[[Bytes, int], Pixels]:
    """Take three bytes as a pixel, in their order or the other way round, without a copy."""

    def convert(rows: Bytes, width: int) -> Pixels:
        return rows.reshape(len(rows), width, 3)[..., ::step]

    return convert


def _colour_of_four(layout: str) -> Callable[[Bytes, int], Pixels]:
    def convert(rows: Bytes, width: int) -> Pixels:
        size = (width, len(rows))
        return np.asarray(Image.frombytes("RGB", size, rows.tobytes(), "raw", layout))

    return convert


def _grey(rows: Bytes, width: int) -> Pixels:
    return np.repeat(rows[..., None], 3, axis=2)


def _grey_16_bit(rows: Bytes, width: int) -> Pixels:
    high_bytes = np.ascontiguousarray(rows).reshape(len(rows), width, 2)[..., 1]
    return np.repeat(high_bytes[..., None], 3, axis=2)


def _yuv_422(swap_pairs: bool) -> Callable[[Bytes, int], Pixels]:
    """Take YUYV, or UYVY to be swapped, through FFmpeg."""

    def convert(rows: Bytes, width: int) -> Pixels:
        av = import_av("This image encoding")
        height = len(rows)
        pixels = np.ascontiguousarray(rows).reshape(height, width, 2)
        if swap_pairs:
            pixels = np.ascontiguousarray(pixels[..., ::-1])
        if height % 2:  # PyAV takes an even number of rows; they do not depend on each other
            pixels = np.concatenate([pixels, pixels[-1:]])
        image: Pixels = av.VideoFrame.from_ndarray(pixels, "yuyv422").to_ndarray(format="rgb24")
        return image[:height]

    return convert


def _bayer(pattern: str) -> Callable[[Bytes, int], Pixels]:
    return lambda rows, width: rgb_from_mosaic(rows, pattern)


_FORMS: Mapping[str, _Form] = {
    "rgb8": _Form(_colour(1), 3),
    "bgr8": _Form(_colour(-1), 3),
    "8uc3": _Form(_colour(-1), 3),
    "rgba8": _Form(_colour_of_four("RGBX"), 4),
    "bgra8": _Form(_colour_of_four("BGRX"), 4),
    "mono8": _Form(_grey, 1),
    "8uc1": _Form(_grey, 1),
    "mono16": _Form(_grey_16_bit, 2),
    "yuv422": _Form(_yuv_422(swap_pairs=True), 2, even_width=True),
    "uyvy": _Form(_yuv_422(swap_pairs=True), 2, even_width=True),
    "yuv422_yuy2": _Form(_yuv_422(swap_pairs=False), 2, even_width=True),
    "yuyv": _Form(_yuv_422(swap_pairs=False), 2, even_width=True),
    **{f"bayer_{pattern}8": _Form(_bayer(pattern), 1, smallest=2) for pattern in PATTERNS},
}
