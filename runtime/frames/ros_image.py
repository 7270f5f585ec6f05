"""Convert ROS image messages to uint8[H, W, 3] RGB pictures.

The fields may come from `sensor_msgs/Image` or `sensor_msgs/CompressedImage`, of ROS 1 or 2, live
or recorded. FFmpeg converts YUV and Bayer patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.errors import SourceError
from runtime.frames.decoding import import_av
from runtime.vision import Pixels

Bytes = NDArray[np.uint8]


def image_from_message(message: Any) -> Pixels:
    """Return the picture of an Image message: its height, width, encoding, step and data.

    Raises:
        SourceError: the encoding is not known, or the data is too short for the size.
    """
    height, width, step = int(message.height), int(message.width), int(message.step)
    encoding = str(message.encoding).lower()
    convert, bytes_per_pixel = _CONVERSIONS.get(encoding, (None, 0))
    if convert is None:
        raise SourceError(
            f"An image message has the encoding {message.encoding!r}, which is not one of "
            f"{', '.join(sorted(_CONVERSIONS))}. Republish the topic as rgb8."
        )
    data = np.frombuffer(message.data, np.uint8)
    row_bytes = width * bytes_per_pixel
    if not (height and width) or step < row_bytes or data.size < step * height:
        raise SourceError(
            f"An image message says {width}x{height} {message.encoding} with {step} bytes a row, "
            f"and has {data.size} bytes. Its publisher is at fault."
        )
    rows = data[: step * height].reshape(height, step)[:, :row_bytes]  # [H, W * bytes]
    if bytes_per_pixel == 2 and encoding.endswith("16") and bool(message.is_bigendian):
        rows = rows.reshape(height, width, 2)[..., ::-1].reshape(height, row_bytes)
    return convert(rows, width)


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
    return picture_from_bytes(bytes(message.data), "A compressed image message")


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


def _through_ffmpeg(pixel_format: str, swap_pairs: bool = False) -> Callable[[Bytes, int], Pixels]:
    def convert(rows: Bytes, width: int) -> Pixels:
        av = import_av("This image encoding")
        if pixel_format == "yuyv422" and width % 2:
            raise SourceError(f"A YUV 4:2:2 image is {width} pixels wide; the width must be even.")
        pixels = np.ascontiguousarray(rows)
        if pixel_format == "yuyv422":
            pixels = pixels.reshape(len(rows), width, 2)
            if swap_pairs:  # UYVY to YUYV
                pixels = np.ascontiguousarray(pixels[..., ::-1])
        frame = av.VideoFrame.from_ndarray(pixels, format=pixel_format)
        image: Pixels = frame.to_ndarray(format="rgb24")
        return image

    return convert


_CONVERSIONS: Mapping[str, tuple[Callable[[Bytes, int], Pixels], int]] = {
    "rgb8": (_colour(1), 3),
    "bgr8": (_colour(-1), 3),
    "8uc3": (_colour(-1), 3),
    "rgba8": (_colour_of_four("RGBX"), 4),
    "bgra8": (_colour_of_four("BGRX"), 4),
    "mono8": (_grey, 1),
    "8uc1": (_grey, 1),
    "mono16": (_grey_16_bit, 2),
    "yuv422": (_through_ffmpeg("yuyv422", swap_pairs=True), 2),
    "uyvy": (_through_ffmpeg("yuyv422", swap_pairs=True), 2),
    "yuv422_yuy2": (_through_ffmpeg("yuyv422"), 2),
    "yuyv": (_through_ffmpeg("yuyv422"), 2),
    "bayer_rggb8": (_through_ffmpeg("bayer_rggb8"), 1),
    "bayer_bggr8": (_through_ffmpeg("bayer_bggr8"), 1),
    "bayer_gbrg8": (_through_ffmpeg("bayer_gbrg8"), 1),
    "bayer_grbg8": (_through_ffmpeg("bayer_grbg8"), 1),
}
