"""Collect distinct frames spread evenly over a source of unknown length."""

from __future__ import annotations

from dataclasses import dataclass

from calibration.frames.near_duplicates import Signature, is_repeated, measure_change, sign_frame
from runtime.frames.frame_sampler import EvenSample
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

    def look_at(self, levels: Pixels) -> None:
        """Add a frame, uint8[height, width, 3], unless it repeats one that was kept."""
        signature = sign_frame(levels)
        self.read += 1
        if self._previous is not None:
            self.changes.append(measure_change(signature, self._previous))
        self._previous = signature
        if is_repeated(signature, [frame.signature for frame in self.kept]):
            self.repeated += 1
        else:
            self.add(SampledFrame(levels, signature))
