"""Damaged and enormous pictures, for `runtime.vision.pictures`."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image

from runtime.picture_limits import MAX_PIXELS, MAX_SIDE
from runtime.vision.pictures import picture_from_bytes
from tests.faults.attack import Attack
from tests.faults.mutations import damaged, png_of, png_with_right_sums, random_of

_ENORMOUS = (
    (1, 128_000_000, 8, 0),
    (128_000_000, 1, 8, 0),
    (65_536, 65_536, 1, 0),
    (2_000_000_000, 2_000_000_000, 8, 6),
    (1, MAX_SIDE, 8, 6),
    (9000, 9000, 8, 6),
    (7900, 7900, 8, 6),
    (7900, 7900, 16, 2),
)


@lru_cache
def _whole() -> tuple[tuple[str, bytes], ...]:
    """Return a picture in every format that is read, and in the odd corners of some."""
    rng = np.random.default_rng(7)
    slopes = np.add.outer(np.arange(40), np.arange(56))[..., None] * [1, 2, 3]
    levels = (slopes + rng.integers(0, 40, (40, 56, 3))).astype(np.uint8)
    colour = Image.fromarray(levels)
    clear = colour.copy()
    clear.putalpha(Image.fromarray(levels[..., 0]))
    wide = Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    more = {"save_all": True, "append_images": [colour.transpose(Image.Transpose.ROTATE_180)]}
    kinds = (
        ("PNG", colour, {}),
        ("PNG", clear, {}),
        ("PNG", colour.convert("P"), {"transparency": 3}),
        ("PNG", wide, {}),
        ("PNG", colour.convert("1"), {"exif": turned}),
        ("JPEG", colour, {"exif": turned}),
        ("JPEG", colour, {"progressive": True}),
        ("JPEG", colour.convert("CMYK"), {}),
        ("MPO", colour, more),
        ("WEBP", colour, {}),
        ("WEBP", clear, {"lossless": True}),
        ("WEBP", clear, more),
        ("GIF", colour, more),
        ("GIF", colour.convert("P"), {"transparency": 3, "interlace": 1}),
        ("BMP", colour, {}),
        ("BMP", colour.convert("P"), {}),
        ("TIFF", colour, {}),
        ("TIFF", clear, {"compression": "tiff_lzw"}),
        ("TIFF", wide, {"compression": "tiff_adobe_deflate"}),
        ("TIFF", colour, {"compression": "jpeg"}),
        ("TIFF", colour.convert("1"), {"compression": "group4"}),
        ("PPM", colour, {}),
        ("JPEG2000", colour, {}),
        ("AVIF", colour, {}),
        ("AVIF", clear, {"exif": turned}),
    )
    Image.init()
    whole = []
    for name, image, options in kinds:
        if name in Image.SAVE:
            buffer = io.BytesIO()
            image.save(buffer, name, **options)
            whole.append((name, buffer.getvalue()))
    return tuple(whole)


def _picture(number: int) -> bytes:
    rng = random_of("picture", number)
    kinds = _whole()
    name, data = kinds[number % len(kinds)]
    hurt = damaged(data, rng)
    return png_with_right_sums(hurt) if name == "PNG" and rng.integers(4) else hurt


def _enormous(number: int) -> bytes:
    width, height, depth, colour = _ENORMOUS[number % len(_ENORMOUS)]
    if width * height <= 2 * MAX_PIXELS:
        return png_of(width, height, depth=depth, colour=colour)
    small = bytearray(png_of(4, 4, depth=depth, colour=colour))
    small[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return png_with_right_sums(bytes(small))


def _scans(number: int) -> bytes:
    """Return a progressive JPEG that passes over its pixels again and again."""
    buffer = io.BytesIO()
    Image.new("L", (4000, 4000), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    scan = data[data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda")) : -2]
    return data[:-2] + scan * (200 * (number + 1)) + data[-2:]


def _probe(data: bytes) -> None:
    pixels = picture_from_bytes(data, "hostile")
    height, width, channels = pixels.shape
    if pixels.dtype != np.uint8 or channels != 3 or not 0 < height * width <= MAX_PIXELS:
        raise TypeError(f"{pixels.dtype}{pixels.shape} came of it")


ATTACKS = {
    "picture": Attack(_picture, _probe),
    "enormous": Attack(_enormous, _probe),
    "scans": Attack(_scans, _probe),
}
ENORMOUS = len(_ENORMOUS)
