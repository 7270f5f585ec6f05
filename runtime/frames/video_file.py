"""Read a video file, with frames stamped from its own start."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.frames.decoding import captures_of, open_container
from runtime.frames.frame import Capture, ReadErrors

if TYPE_CHECKING:
    from av.container import InputContainer

_TIMEOUT_S = 60.0
"""Longest wait for the header, and for each packet: a damaged index can send FFmpeg in circles."""


class VideoFile:
    """Any file FFmpeg can read."""

    live = False

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            SourceError: it is not a video.
        """
        self.name = str(path)
        self._closed = threading.Event()
        # With its protocol, so that no name of a file is taken for one.
        target = f"file:{path}"
        self._container = open_container(
            self.name, target, timeout_s=_TIMEOUT_S, self_contained=True
        )
        self.length = _length_of(self._container)

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        """Yield every picture of the file."""
        return captures_of(self._container, errors, self._closed.is_set, wall_clock=False)

    def close(self) -> None:
        """Stop before the next packet."""
        self._closed.set()


def _length_of(container: InputContainer) -> int | None:
    """Return how many frames there are: as the file says, or as its length and rate tell."""
    stream = container.streams.video[0]
    if stream.frames or not (container.duration and stream.average_rate):
        return stream.frames or None
    return round(container.duration * stream.average_rate / 1_000_000)  # from microseconds
