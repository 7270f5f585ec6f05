"""Describe what a set of frames covers, and warn of what it lacks.

A quantizer knows only the values it was shown: frames of one corridor by day give scales that clip
at night.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from calibration.frames.colour_order import ColourOrder, judge_colour_order
from calibration.frames.distinct_frames import DistinctFrames
from calibration.frames.near_duplicates import Signature, count_scenes

FEWEST_FRAMES = 128
FEWEST_SCENES = 8
NARROWEST_BRIGHTNESS = 30.0
"""Levels of 255 between the dark and the bright frames below which the light hardly varied."""
DARK, BRIGHT = 40.0, 215.0
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Spread:
    """The 5th, 50th and 95th percentile of something, in levels of 255."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Coverage:
    """What a calibration set covers.

    Attributes:
        seen: frames the source had.
        read: frames that were decoded and looked at.
        unreadable: frames that could not be used, by reason.
        repeated: near-duplicates of a frame that was kept.
        frames: distinct frames in the set.
        scenes: different views among them.
        brightness: mean level of a frame.
        motion: mean change of a block from one frame that was read to the next.
        colour_order: whether red outweighs blue.
        warnings: what is thin or suspicious, a paragraph each.
    """

    seen: int
    read: int
    unreadable: Mapping[str, int]
    repeated: int
    frames: int
    scenes: int
    brightness: Spread
    motion: Spread
    colour_order: ColourOrder
    warnings: tuple[str, ...] = ()


def measure_coverage(
    sample: DistinctFrames, signatures: Sequence[Signature], unreadable: Mapping[str, int]
) -> Coverage:
    """Measure what was collected.

    Args:
        sample: how the reading went.
        signatures: of the frames in the set.
        unreadable: frames that could not be used, by reason.
    """
    levels = np.array([signature.mean() for signature in signatures])
    facts: dict[str, Any] = {
        "seen": sample.seen,
        "read": sample.read,
        "unreadable": dict(unreadable),
        "repeated": sample.repeated,
        "frames": len(signatures),
        "scenes": count_scenes(signatures),
        "brightness": _spread(levels),
        "motion": _spread(np.array(sample.changes or [0.0])),
        "colour_order": judge_colour_order(signatures),
    }
    return Coverage(**facts, warnings=tuple(_find_gaps(Coverage(**facts), levels)))


def _spread(values: np.ndarray[Any, Any]) -> Spread:
    return Spread(*(round(float(value), 1) for value in np.percentile(values, (5, 50, 95))))


def _find_gaps(found: Coverage, levels: np.ndarray[Any, Any]) -> list[str]:
    gaps = []
    if found.frames < FEWEST_FRAMES:
        gaps.append(
            f"{found.frames} distinct frames, expected {FEWEST_FRAMES} or more "
            f"({found.read} were read, {found.repeated} showed the same picture as another). Add "
            "frames of other places and times."
        )
    if found.scenes < FEWEST_SCENES:
        gaps.append(
            f"{found.scenes} different views, expected {FEWEST_SCENES} or more: the camera hardly "
            f"moved (median change from frame to frame {found.motion.middle:g} of 255, "
            f"{found.repeated} of {found.read} frames repeated). Record a drive through the places "
            "the robot works in."
        )
    gaps += _find_light_gaps(found.brightness, levels)
    order = found.colour_order
    if order.is_suspicious:
        gaps.append(
            f"red and blue may be exchanged: in {order.cool} of {order.coloured} coloured frames "
            "blue outweighs red, and in photographs it is mostly the other way round. If the "
            "frames went through OpenCV, convert them with cv2.COLOR_BGR2RGB; if the scene is "
            "truly blue (water, sky, blue light), ignore this."
        )
    return gaps


def _find_light_gaps(brightness: Spread, levels: np.ndarray[Any, Any]) -> list[str]:
    for is_such, what, other in (
        (levels < DARK, f"darker than {DARK:g}", "by day"),
        (levels > BRIGHT, f"brighter than {BRIGHT:g}", "in the shade and by night"),
    ):
        share = float(is_such.mean())
        if share >= _NEARLY_ALL:
            return [
                f"{share:.0%} of the frames are {what} of 255. If the robot also works {other}, "
                "add such frames."
            ]
    if brightness.high - brightness.low < NARROWEST_BRIGHTNESS:
        return [
            f"all frames are about equally bright ({brightness.low:g} to {brightness.high:g} of "
            "255). If the robot also works in other light, add such frames."
        ]
    return []


def document_from_coverage(coverage: Coverage) -> dict[str, Any]:
    """Return a coverage as a JSON object."""
    return asdict(coverage)


def lines_from_coverage(coverage: Coverage) -> list[str]:
    """Return a coverage as lines for people, without its warnings."""
    unreadable = sum(coverage.unreadable.values())
    return [
        f"{coverage.frames} distinct frames of {coverage.scenes} views, from {coverage.seen:,} "
        f"frames ({coverage.read:,} read, {coverage.repeated:,} repeated, {unreadable} unreadable)",
        f"brightness {_told(coverage.brightness)}, change between frames {_told(coverage.motion)}",
    ]


def _told(spread: Spread) -> str:
    return f"{spread.low:g} to {spread.high:g} of 255 (median {spread.middle:g})"
