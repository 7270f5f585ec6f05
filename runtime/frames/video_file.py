"""Read a video file, with frames stamped from its own start."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from runtime.frames.decoding import captures_of, open_container
from runtime.frames.frame import Capture, ReadErrors


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
        self._container = open_container(self.name, str(path))

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        """Yield every picture of the file."""
        return captures_of(self._container, errors, self._closed.is_set, wall_clock=False)

    def close(self) -> None:
        """Stop before the next packet."""
        self._closed.set()
