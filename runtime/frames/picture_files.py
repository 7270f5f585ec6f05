"""Read pictures on disk as a source: one file, or a folder in the order of its names."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from engines.errors import SourceError
from runtime.frames.frame import Capture, ReadErrors
from runtime.vision import Pixels

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
)

_FOLDER_FPS = 1.0
"""Pictures have no time of their own; a folder is read as one per second."""


class PictureFiles:
    """A picture file, or all of a folder's; sub-folders are left alone."""

    live = False

    def __init__(self, path: Path) -> None:
        """List the pictures.

        Raises:
            SourceError: there is none.
        """
        self.name = str(path)
        self._closed = threading.Event()
        self._files = [path] if path.is_file() else _pictures_in(path)
        if not self._files:
            suffixes = ", ".join(sorted(PICTURE_SUFFIXES))
            raise SourceError(
                f"{path} has no pictures in it. Give a folder that holds files ending in "
                f"{suffixes}; sub-folders are not looked into."
            )
        self.length: int | None = len(self._files)

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        """Yield one capture per file."""
        for index, file in enumerate(self._files):
            if self._closed.is_set():
                return
            yield Capture(round(index * 1e9 / _FOLDER_FPS), partial(_load, file))

    def close(self) -> None:
        """Stop before the next file."""
        self._closed.set()


def _pictures_in(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
    return sorted((file for file in files if file.is_file()), key=_natural_order)


def _natural_order(file: Path) -> list[tuple[int, str]]:
    """Sort frame2 before frame10."""
    pieces = re.findall(r"\d+|\D+", file.name)
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]


def _load(file: Path) -> Pixels:
    from runtime.vision.pictures import load_picture

    return load_picture(file)
