"""Collect distinct frames spread evenly over a source of unknown length, and squares of each.

A picture that is cut into up to 37 squares would fill memory and hours with a few frames, and the
frame with most tiles would decide the ranges. So every frame gives the same few: the view of all of
it, and tiles by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from calibration.frames.near_duplicates import Signature, is_repeated, measure_change, sign_frame
from runtime.frames.frame_sampler import EvenSample
from runtime.vision import Pixels

_MOST_SQUARES = 512
"""Of all frames together, unless there are so many frames that `_FEWEST_OF_A_FRAME` are more."""
_MOST_OF_A_FRAME = 5
_FEWEST_OF_A_FRAME = 2
"""The view of all of it and one tile."""


@dataclass(frozen=True, eq=False)
class SampledFrame:
    """A frame that was kept.

    Attributes:
        squares: uint8[height, width, 3] each; the first is the view of the whole frame.
        signature: what it is compared by.
    """

    squares: tuple[Pixels, ...]
    signature: Signature


class DistinctFrames(EvenSample[SampledFrame]):
    """An even sample of frames, none the same picture as another.

    Attributes:
        read: frames that were looked at.
        repeated: of these, near-duplicates of a frame that was kept.
        changes: levels of 255 by which each frame that was read differs from the one before.
    """

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.read = self.repeated = 0
        self.changes: list[float] = []
        self._previous: Signature | None = None
        self._each = _MOST_OF_A_FRAME

    def look_at(self, squares: Sequence[Pixels]) -> None:
        """Add a frame unless it repeats one that was kept.

        Args:
            squares: of the frame, uint8[height, width, 3] each, the view of all of it first.
        """
        signature = sign_frame(squares[0])
        self.read += 1
        if self._previous is not None:
            self.changes.append(measure_change(signature, self._previous))
        self._previous = signature
        if is_repeated(signature, [frame.signature for frame in self.kept]):
            self.repeated += 1
        else:
            self.add(SampledFrame(_choose(squares, self._each, self.read), signature))

    def add(self, item: SampledFrame) -> None:
        """Hold a frame, with as many squares of every frame as there is room for."""
        super().add(item)
        self._each = min(self._each, _squares_each(len(self.kept)))
        self.kept = [replace(one, squares=one.squares[: self._each]) for one in self.kept]


def most_squares(frames: int) -> int:
    """Return how many squares so many frames give at most, where they are cut into tiles."""
    return frames * _squares_each(frames)


def _squares_each(frames: int) -> int:
    return min(_MOST_OF_A_FRAME, max(_FEWEST_OF_A_FRAME, _MOST_SQUARES // frames))


def _choose(squares: Sequence[Pixels], most: int, turn: int) -> tuple[Pixels, ...]:
    """Return the view of all of a frame and some of its tiles, by chance from ``turn``."""
    whole, *tiles = squares
    order = np.random.default_rng(turn).permutation(len(tiles))
    # Copied, because a tile is a part of a canvas that would stay in memory with it.
    return (whole, *(tiles[at].copy() for at in order[: most - 1]))
