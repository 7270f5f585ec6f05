"""Sources, encoders and answerers whose every move a test decides."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from runtime.frames import FrameSource
from runtime.frames.frame import Capture, ReadErrors
from runtime.model import Answer
from runtime.vision import Pixels, VisualTokens


class Script:
    """A reader that gives the pictures of an iterator."""

    name = "script"

    def __init__(self, pictures: Iterator[Pixels], live: bool = True, period_s: float = 0.0):
        self.live, self.period_s = live, period_s
        self._pictures = pictures
        self._closed = threading.Event()

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        for index, picture in enumerate(self._pictures):
            if self._closed.wait(self.period_s):
                return
            yield Capture(index, lambda picture=picture: picture)

    def close(self) -> None:
        self._closed.set()


def source_of(
    pictures: Iterator[Pixels], live: bool = True, period_s: float = 0.002
) -> FrameSource:
    return FrameSource(Script(pictures, live, period_s))


def numbered(count: int, height: int = 8, width: int = 8) -> Iterator[Pixels]:
    """Pictures whose shade is their number modulo 256."""
    for index in range(count):
        yield np.full((height, width, 3), index % 256, np.uint8)


class ShadeEncoder:
    """One visual token: the shade of the upper left pixel."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.calls = 0
        self.busy: list[tuple[float, float]] = []

    def encode(self, images: Sequence[Pixels]) -> list[VisualTokens]:
        return [self.encode_one(image) for image in images]

    def encode_one(self, image: Pixels) -> VisualTokens:
        self.calls += 1
        started_s = time.monotonic()
        time.sleep(self.seconds)
        self.busy.append((started_s, time.monotonic()))
        shade = float(image[0, 0, 0])
        return VisualTokens(
            tokens=np.full((1, 1, 4), shade, np.float32),
            valid=np.ones(1, np.int64),
            origin=np.zeros((1, 1), np.int64),
            assignment=np.zeros((1, 1), np.int64),
            milliseconds={"preprocess": 0.0, "encode": self.seconds * 1e3},
        )


def answer_of(text: str, **milliseconds: float) -> Answer:
    """An answer of two tokens."""
    return Answer(text, (1, 2), "stop_token", "double", 9, 0, milliseconds)


class ShadeAnswerer:
    """Says the question and the shade."""

    def __init__(self, prefill_s: float = 0.0, decode_s: float = 0.0) -> None:
        self.prefill_s, self.decode_s = prefill_s, decode_s
        self.calls = 0
        self.decoding: list[tuple[float, float]] = []

    def answer(
        self,
        visual: VisualTokens,
        question: str,
        prefilled: Callable[[], None],
        interrupted: Callable[[], bool],
    ) -> Answer:
        self.calls += 1
        time.sleep(self.prefill_s)
        prefilled()
        started_s = time.monotonic()
        end_s = started_s + self.decode_s
        while time.monotonic() < end_s and not interrupted():
            time.sleep(0.001)
        self.decoding.append((started_s, time.monotonic()))
        return answer_of(
            f"{question} {visual.tokens[0, 0, 0]:.0f}",
            prefill=self.prefill_s * 1e3,
            decode=self.decode_s * 1e3,
        )
