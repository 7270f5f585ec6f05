"""A few frames spread evenly over a source whose length nobody knows, in memory for those few.

Enters: frames as they come. Leaves: at most as many as asked for, none the same picture as another.
All frames are taken until there are twice as many as wanted; then every other one is let go and
from there on only every second frame is looked at, and so on. What stays is spread over the whole
source, whether it was a minute or a day.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibration.frames.near_duplicates import Signature, is_repeated, measure_change, sign_frame
from runtime.vision import Pixels


@dataclass(frozen=True, eq=False)
class SampledFrame:
    """A frame that was kept.

    Attributes:
        levels: uint8[height, width, 3].
        signature: what it is compared by.
    """

    levels: Pixels
    signature: Signature


class EvenSample:
    """Collects frames.

    Attributes:
        seen: frames the source had so far.
        read: frames that were looked at.
        repeated: of these, near-duplicates of a frame that was kept.
        changes: levels of 255 by which each frame that was read differs from the one before.
    """

    def __init__(self, most: int) -> None:
        self.seen = self.read = self.repeated = 0
        self.changes: list[float] = []
        self._most = most
        self._stride = 1
        self._kept: list[SampledFrame] = []
        self._previous: Signature | None = None

    def __len__(self) -> int:
        return min(len(self._kept), self._most)

    def wants_next(self) -> bool:
        """Say whether the next frame of the source is to be read at all."""
        self.seen += 1
        return (self.seen - 1) % self._stride == 0

    def add(self, levels: Pixels) -> None:
        """Look at a frame, uint8[height, width, 3]."""
        signature = sign_frame(levels)
        self.read += 1
        if self._previous is not None:
            self.changes.append(measure_change(signature, self._previous))
        self._previous = signature
        if is_repeated(signature, [frame.signature for frame in self._kept]):
            self.repeated += 1
            return
        self._kept.append(SampledFrame(levels, signature))
        if len(self._kept) == 2 * self._most:
            self._kept = self._kept[::2]
            self._stride *= 2

    def frames(self) -> list[SampledFrame]:
        """Return what was collected, in its order."""
        if len(self._kept) <= self._most:
            return list(self._kept)
        places = np.linspace(0, len(self._kept) - 1, self._most).round().astype(int)
        return [self._kept[place] for place in places]
