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
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from engines.errors import PictureError
from runtime.vision.resize import Pixels

MAX_PIXELS = 128_000_000
"""Larger pictures are refused before they are decoded: 128 Mpx are 384 MB of RGB."""

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
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise PictureError(f"{path} does not exist, expected a picture file.") from None
    except OSError as error:
        raise PictureError(f"{path} cannot be read: {error}. Expected a picture file.") from error
    return picture_from_bytes(data, str(path))


def picture_from_bytes(data: bytes, name: str = "the picture") -> Pixels:
    """Decode the bytes of a picture file.

    Args:
        data: the file's content.
        name: what to call it in errors.

    Returns:
        RGB, uint8[H, W, 3].

    Raises:
        PictureError: not a picture, truncated or too large.
    """
    if not data:
        raise PictureError(f"{name} is empty, expected a picture. Copy or record it again.")
    try:
        with (
            warnings.catch_warnings(),
            Image.open(io.BytesIO(data), formats=_known_formats()) as image,
        ):
            warnings.simplefilter("ignore")  # odd metadata does not change a pixel
            _refuse_too_large(image, name)
            image.load()
            return _rgb_pixels(ImageOps.exif_transpose(image), image.format, name)
    except UnidentifiedImageError:
        raise PictureError(
            f"{name} is not a picture Foveate reads ({len(data):,} bytes, beginning with "
            f"{data[:8]!r}). Expected one of {', '.join(_known_formats())}; convert it first."
        ) from None
    except Image.DecompressionBombError:
        raise PictureError(_too_large_message(name, "more pixels than Pillow decodes")) from None
    except (OSError, SyntaxError, ValueError, EOFError, ArithmeticError, IndexError) as error:
        # Pillow's decoders meet damaged data with any of these.
        raise PictureError(
            f"{name} is damaged or truncated after {len(data):,} bytes ({error}). Copy or record "
            "it again."
        ) from error


def _known_formats() -> list[str]:
    """Return those of our formats that this build of Pillow can decode."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _refuse_too_large(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise PictureError(_too_large_message(name, f"{width} x {height} pixels"))


def _too_large_message(name: str, got: str) -> str:
    return (
        f"{name} has {got}, expected at most {MAX_PIXELS:,}. A vision tower sees a few hundred "
        "pixels a side: scale the picture down first."
    )


def _rgb_pixels(image: Image.Image, file_format: str | None, name: str) -> Pixels:
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in {"PNG", "PPM"}):
        grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)  # [H, W]
        return np.repeat(grey[:, :, None], 3, axis=2)  # [H, W, 3]
    if image.mode in {"I", "F"}:
        raise PictureError(
            f"{name} has 32-bit pixels (mode {image.mode}), which do not say what white is. "
            "Save it with 8 or 16 bits per channel."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))  # [H, W, 3]
