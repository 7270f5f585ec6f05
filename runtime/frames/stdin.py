"""Read frames from standard input.

The input is a stream that FFmpeg can read (MJPEG, MPEG-TS, Matroska, YUV4MPEG2), or bare RGB24
frames of a given size, which need only NumPy.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

import numpy as np

from engines.errors import SourceError
from runtime.frames.decoding import captures_of, open_container
from runtime.frames.frame import Capture, ReadErrors
from runtime.picture_limits import size_problem
from runtime.vision import Pixels


def standard_input() -> BinaryIO:
    """Return standard input as bytes.

    Raises:
        SourceError: the process was started without one.
    """
    if sys.stdin is None:
        raise SourceError("Standard input is closed. Pipe into it what is to be read.")
    return sys.stdin.buffer


class StdinStream:
    """Standard input in a format that FFmpeg knows."""

    live = True
    name = "stdin"

    def __init__(self, stream: BinaryIO | None = None) -> None:
        """Wait for the stream's header.

        Raises:
            SourceError: it is no video.
        """
        self._closed = threading.Event()
        self._container = open_container(self.name, stream or standard_input(), self_contained=True)

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        """Yield pictures until the writer closes the pipe."""
        return captures_of(self._container, errors, self._closed.is_set, wall_clock=True)

    def close(self) -> None:
        """Stop after the read in progress."""
        self._closed.set()


class StdinFrames:
    """Standard input as bare frames of one size: height x width x 3 bytes each, RGB."""

    live = True
    name = "stdin"

    def __init__(self, size: str, stream: BinaryIO | None = None) -> None:
        """Take the size, for example ``640x480``.

        Raises:
            SourceError: the size is not width x height, or too large.
        """
        digits = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", size)
        if digits is None:
            raise SourceError(
                f"The frame size is {size!r}, expected WIDTHxHEIGHT as in raw:640x480."
            )
        width, height = map(int, digits.groups())
        if problem := size_problem(width, height):
            raise SourceError(f"The frame size raw:{size} is {problem}. Send smaller frames.")
        self._shape = (height, width, 3)
        self._stream = stream or standard_input()
        self._closed = threading.Event()

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        """Yield frames until the writer closes the pipe; a piece of one at the end is counted."""
        frame_bytes = int(np.prod(self._shape))
        while not self._closed.is_set():
            data = self._stream.read(frame_bytes)
            if len(data) < frame_bytes:
                if data:
                    errors.count(
                        "cut short", f"the last frame has {len(data)} of {frame_bytes} bytes"
                    )
                return
            yield Capture(time.time_ns(), partial(self._image, data))

    def _image(self, data: bytes) -> Pixels:
        return np.frombuffer(data, np.uint8).reshape(self._shape)

    def close(self) -> None:
        """Stop after the read in progress."""
        self._closed.set()
