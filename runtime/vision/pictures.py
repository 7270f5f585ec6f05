"""Read a picture file into uint8[H, W, 3] RGB pixels, upright.

The pixels are those the checkpoint's own image processor would see: EXIF orientation is applied,
greyscale, palette and CMYK are converted, and transparent pixels are composited on white (as
CLIPImageProcessor of transformers 5 does; version 4 showed the colour hidden below). Of an
animation the first frame is taken. Sixteen-bit greyscale keeps its high byte; Pillow alone would
clip all but the darkest values to white.
"""

from __future__ import annotations

import io
import os
import stat
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from engines.errors import PictureError
from runtime.picture_limits import MAX_FILE_BYTES, MAX_PIXELS, size_problem
from runtime.vision.resize import Pixels

_BAND_PIXELS = 4_000_000
"""Pixels converted at once, so that a conversion never holds a second copy of a large picture."""
_SCANNED_PIXELS = 20 * MAX_PIXELS
"""Pixels times scans of a progressive JPEG; real ones have about ten scans."""

# Pillow also opens formats that run other programs (EPS) or are documents.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")


def load_picture(path: str | os.PathLike[str]) -> Pixels:
    """Read a picture file.

    Args:
        path: JPEG, PNG, WebP, BMP, GIF, TIFF, PPM, JPEG 2000 or AVIF.

    Returns:
        RGB, uint8[H, W, 3].

    Raises:
        PictureError: the file is missing, not a picture, truncated or too large.
    """
    try:
        return picture_from_bytes(_read_regular_file(path), str(path))
    except FileNotFoundError:
        raise PictureError(f"{path} does not exist, expected a picture file.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise PictureError(f"{path} cannot be read: {error}. Expected a picture file.") from error


def _read_regular_file(path: str | os.PathLike[str]) -> bytes:
    """Read a file of bounded size; pipes, sockets and devices, which may never end, are refused."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise PictureError(
                f"{path} cannot be read: it is not a regular file. Expected a picture file; write "
                "what a pipe or a device gives to a file first."
            )
        if status.st_size > MAX_FILE_BYTES:
            raise PictureError(
                f"{path} has {status.st_size:,} bytes, expected at most {MAX_FILE_BYTES:,}. Scale "
                "the picture down or compress it."
            )
        return file.read(MAX_FILE_BYTES + 1)  # it may be growing


def picture_from_bytes(
    data: bytes, name: str = "the picture", most_pixels: int | None = None
) -> Pixels:
    """Decode the bytes of a picture file.

    Args:
        data: the file's content.
        name: what to call it in errors.
        most_pixels: it may have; left out, `MAX_PIXELS`.

    Returns:
        RGB, uint8[H, W, 3].

    Raises:
        PictureError: not a picture, truncated or too large.
    """
    if not data:
        raise PictureError(f"{name} is empty, expected a picture. Copy or record it again.")
    if len(data) > MAX_FILE_BYTES:
        raise PictureError(_too_large_message(name, f"{len(data):,} bytes"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does not change a pixel
            with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
                _refuse_too_large(image, data, name, most_pixels)
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _rgb_pixels(image, image.format, name)
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(
            f"{name} is not a picture Foveate reads ({len(data):,} bytes, beginning with "
            f"{data[:8]!r}). Expected one of {', '.join(_known_formats())}; convert it first."
        ) from None
    except Image.DecompressionBombError:
        raise PictureError(_too_large_message(name, "more pixels than Pillow decodes")) from None
    except MemoryError as error:
        raise PictureError(
            _too_large_message(name, "more pixels than this machine has memory for")
        ) from error
    except Exception as error:  # each of Pillow's decoders meets damage with exceptions of its own
        raise PictureError(
            f"{name} is damaged or truncated after {len(data):,} bytes "
            f"({' '.join(str(error).split()) or type(error).__name__}). Copy or record it again."
        ) from error


def _known_formats() -> list[str]:
    """Return those of our formats that this build of Pillow can decode."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _refuse_too_large(image: Image.Image, data: bytes, name: str, most_pixels: int | None) -> None:
    problem = size_problem(*image.size, most_pixels)
    if problem is not None:
        raise PictureError(_too_large_message(name, problem))
    if image.format not in {"JPEG", "MPO"}:
        return
    # Every scan of a progressive JPEG passes over all pixels, and costs a few bytes.
    scans = data.count(b"\xff\xda")
    if scans * image.width * image.height > _SCANNED_PIXELS:
        raise PictureError(_too_large_message(name, f"{scans} scans of {image.size} pixels"))


def _too_large_message(name: str, got: str) -> str:
    return (
        f"{name} has {got}. A vision tower sees a few hundred pixels a side: scale the picture "
        "down first."
    )


def _rgb_pixels(image: Image.Image, file_format: str | None, name: str) -> Pixels:
    wide = image.mode.startswith("I;16") or (image.mode == "I" and file_format in {"PNG", "PPM"})
    if image.mode in {"I", "F"} and not wide:
        raise PictureError(
            f"{name} has 32-bit pixels (mode {image.mode}), which do not say what white is. "
            "Save it with 8 or 16 bits per channel."
        )
    convert = _grey_of_16_bits if wide else _composited_on_white
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = convert(image.crop((0, top, image.width, bottom)))
    return pixels


def _grey_of_16_bits(band: Image.Image) -> Pixels:
    """Return the high bytes, uint8[h, W, 1]."""
    grey = (np.asarray(band).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)  # [h, W]
    return grey[:, :, None]


def _composited_on_white(band: Image.Image) -> Pixels:
    """Return uint8[h, W, 3]."""
    if band.has_transparency_data:
        band = band.convert("RGBA")
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        band = Image.alpha_composite(white, band)
    return np.asarray(band.convert("RGB"))
