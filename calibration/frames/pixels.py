"""Frames as a vision tower sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from runtime.vision.preprocess import PixelValues


class Frames(Protocol):
    """Frames that can be gone through more than once; a list of arrays is such a thing."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[PixelValues]:
        """Yield float32[1, 3, H, W], what the bundle's preprocessing makes of a picture."""
