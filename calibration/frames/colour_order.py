"""Suspect frames whose red and blue are exchanged (BGR read as RGB).

Most coloured pixels of photographs are warm (skin, wood, soil, brick, lamplight): more red than
blue. Exchanged, they are cool. One frame proves little, because a blue sky is cool too; most frames
of a set being cool is worth a warning. Blue scenes (a pool, a wide sky) raise it as well, and the
warning says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibration.frames.near_duplicates import Signature

_COLOURED = 16
"""Levels of 255 between a block's channels from which on it has a colour."""
_LEAST_AREA = 0.02
"""Share of a frame that must have a colour for the frame to have a say."""
_LEAST_FRAMES = 16
_SUSPICIOUS = 0.8


@dataclass(frozen=True)
class ColourOrder:
    """Which of red and blue outweighs the other.

    Attributes:
        coloured: frames in which enough has a colour.
        cool: of these, frames in which more of it is blue over red than red over blue.
    """

    coloured: int
    cool: int

    @property
    def is_suspicious(self) -> bool:
        """Whether exchanging red and blue would make the set look more like photographs."""
        return self.coloured >= _LEAST_FRAMES and self.cool >= _SUSPICIOUS * self.coloured


def judge_colour_order(signatures: Sequence[Signature]) -> ColourOrder:
    """Count coloured and cool frames."""
    coloured = cool = 0
    for signature in signatures:
        has_colour = signature.max(axis=2) - signature.min(axis=2) >= _COLOURED  # [16, 16]
        if has_colour.mean() < _LEAST_AREA:
            continue
        red, blue = signature[has_colour][:, 0], signature[has_colour][:, 2]
        coloured += 1
        cool += bool(np.sum(blue > red) > np.sum(red > blue))
    return ColourOrder(coloured, cool)
