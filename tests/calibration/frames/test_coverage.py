"""Coverage: numbers that describe a set, and a warning for each way of being thin."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from calibration.frames.colour_order import judge_colour_order
from calibration.frames.coverage import (
    document_from_coverage,
    lines_from_coverage,
    measure_coverage,
)
from calibration.frames.distinct_frames import DistinctFrames
from calibration.frames.near_duplicates import sign_frame
from tests.photographs import load_photographs

Picture = np.ndarray
COLOURED = (
    *("astronaut.png", "chelsea.png", "coffee.png"),
    *("motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)


def cover(pictures: list[Picture]) -> tuple[object, list[str]]:
    sample = DistinctFrames(256)
    for picture in pictures:
        sample.wants_next()
        sample.look_at([picture])
    coverage = measure_coverage(sample, [frame.signature for frame in sample.items()], {})
    json.dumps(document_from_coverage(coverage))
    return coverage, list(coverage.warnings)


def scenes(count: int, low: int, high: int) -> list[Picture]:
    """Return pictures of coarse noise between two levels."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(low, high, (count, 4, 4, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(one).resize((64, 64), 0)) for one in coarse]


def patches_of_photographs(exchanged: bool = False) -> list[Picture]:
    pictures = []
    for name in COLOURED:
        photograph = load_photographs()[name]
        rows, columns = photograph.shape[0] // 2, photograph.shape[1] // 2
        for row in (0, rows):
            for column in (0, columns):
                quarter = photograph[row : row + rows, column : column + columns]
                pictures.append(np.ascontiguousarray(quarter[..., :: -1 if exchanged else 1]))
    return pictures


def test_a_rich_set_has_no_warning() -> None:
    bright = [
        np.clip(picture * factor, 0, 255).astype(np.uint8)
        for factor in (0.3, 0.7, 1.0)
        for picture in scenes(60, 20, 255)
    ]
    coverage, warnings = cover(bright)
    assert warnings == []
    told = "\n".join(lines_from_coverage(coverage))  # type: ignore[arg-type]
    assert "180 distinct frames of" in told


def test_few_frames_of_few_views() -> None:
    _, warnings = cover(scenes(3, 0, 255) * 4)
    text = "\n".join(warnings)
    assert "3 distinct frames, expected 128 or more (12 were read, 9 showed the same" in text
    assert "3 different views, expected 8 or more" in text


def test_night_only() -> None:
    _, warnings = cover(scenes(140, 0, 40))
    assert any("100% of the frames are darker than 40 of 255" in one for one in warnings)


def test_snow_only() -> None:
    _, warnings = cover(scenes(140, 220, 255))
    assert any("brighter than 215 of 255" in one for one in warnings)


def test_one_light_only() -> None:
    _, warnings = cover(scenes(140, 60, 200))
    assert any("about equally bright" in one for one in warnings)


def test_brightness_and_motion_are_in_levels() -> None:
    ramp = [np.full((64, 64, 3), level, np.uint8) for level in range(0, 201, 20)]
    coverage, _ = cover(ramp)
    assert coverage.brightness.middle == 100  # type: ignore[attr-defined]
    assert coverage.motion.middle == 20  # type: ignore[attr-defined]


@pytest.mark.parametrize("exchanged", [False, True])
def test_exchanged_red_and_blue_are_suspected_in_photographs(exchanged: bool) -> None:
    pictures = patches_of_photographs(exchanged)
    order = judge_colour_order([sign_frame(picture) for picture in pictures])
    assert order.is_suspicious is exchanged
    _, warnings = cover(pictures)
    assert any("red and blue may be exchanged" in one for one in warnings) is exchanged


def test_grey_frames_and_too_few_raise_no_suspicion() -> None:
    grey = [np.repeat(p[..., :1], 3, axis=2) for p in patches_of_photographs()]
    assert judge_colour_order([sign_frame(p) for p in grey]).coloured == 0
    blue = np.zeros((64, 64, 3), np.uint8)
    blue[..., 2] = 200
    assert not judge_colour_order([sign_frame(blue)] * 15).is_suspicious
    assert judge_colour_order([sign_frame(blue)] * 16).is_suspicious
