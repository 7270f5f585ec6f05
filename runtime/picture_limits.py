"""Limit how large a picture may be, before anything is decoded, allocated or handed to C.

The limits bound what one hostile file or frame can cost. The largest PNG they let through, 250 kB
of 8000 x 8000 pixels with transparency, takes 0.56 GB and a few seconds.
"""

from __future__ import annotations

MAX_PIXELS = 64_000_000
"""Width times height; 64 Mpx are 192 MB of RGB."""
MAX_SIDE = 65_535
"""Pixels along one side: what JPEG can hold. Decoders keep a pointer for each row."""
MAX_FILE_BYTES = 256_000_000
"""Bytes of one encoded picture."""


def size_problem(width: int, height: int, most_pixels: int | None = None) -> str | None:
    """Say what is wrong with a picture's size; None where nothing is."""
    most_pixels = min(most_pixels or MAX_PIXELS, MAX_PIXELS)
    if width < 1 or height < 1:
        return f"{width} x {height} pixels, expected at least one"
    if width > MAX_SIDE or height > MAX_SIDE:
        return f"{width} x {height} pixels, expected at most {MAX_SIDE:,} along a side"
    if width * height > most_pixels:
        return f"{width} x {height} pixels, expected at most {most_pixels:,}"
    return None
