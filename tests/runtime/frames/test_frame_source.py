"""Rotation, crop, frame rate and the counting of errors, over a reader made for the test."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from engines.errors import OptionError, SourceError
from runtime.frames import FrameSource, SourceOptions
from runtime.frames.frame import Capture, ReadErrors
from runtime.frames.source import FrameClock, crop_from_text
from runtime.vision import Pixels


class Numbered:
    """Frames whose pixel (y, x) is (index, y, x)."""

    name = "numbered"
    live = False

    def __init__(self, times_ns: list[int], bad: frozenset[int] = frozenset()) -> None:
        self.times_ns, self.bad, self.decoded, self.closed = times_ns, bad, 0, False

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        for index, time_ns in enumerate(self.times_ns):
            yield Capture(time_ns, lambda index=index: self.image(index))

    def image(self, index: int) -> Pixels:
        self.decoded += 1
        if index in self.bad:
            raise SourceError(f"frame {index} is torn")
        y, x = np.mgrid[0:4, 0:6]
        return np.stack([np.full((4, 6), index), y, x], axis=-1).astype(np.uint8)

    def close(self) -> None:
        self.closed = True


def test_crop_is_taken_before_the_rotation_which_is_clockwise() -> None:
    options = SourceOptions(rotate=90, crop=(1, 2, 3, 2))
    (frame,) = FrameSource(Numbered([7]), options)
    assert frame.image.shape == (3, 2, 3)
    assert frame.timestamp_ns == 7
    # Clockwise: the lower left corner of the crop (y 3, x 1) is shown at the upper left.
    assert frame.image[0, 0].tolist() == [0, 3, 1]
    assert frame.image[0, 1].tolist() == [0, 2, 1]


def test_frames_that_are_not_wanted_are_not_decoded() -> None:
    reader = Numbered([index * 100_000_000 for index in range(30)])  # 10 fps for 3 s
    frames = list(FrameSource(reader, SourceOptions(fps=2)))
    assert [frame.timestamp_ns for frame in frames] == [n * 500_000_000 for n in range(6)]
    assert reader.decoded == 6


def test_errors_are_counted_and_the_rest_is_read() -> None:
    source = FrameSource(Numbered([0, 1, 2, 3], bad=frozenset({1, 2})))
    assert [frame.image[0, 0, 0] for frame in source] == [0, 3]
    assert source.errors.counts == {"undecodable": 2}
    assert source.errors.last == "numbered: frame 2 is torn"


def test_a_crop_outside_the_frame_is_counted_with_the_size_it_met() -> None:
    source = FrameSource(Numbered([0]), SourceOptions(crop=(5, 0, 4, 4)))
    assert list(source) == []
    assert "5,0,4,4 reaches outside a frame of 6x4 pixels" in source.errors.last


def test_clock_keeps_time_over_jitter_and_starts_anew_when_set_back() -> None:
    clock = FrameClock(fps=10)
    jitter = [0, 98, 203, 299, 401]
    assert all(clock.wants(ms * 1_000_000) for ms in jitter)
    assert not clock.wants(450_000_000)
    assert clock.wants(-3_600_000_000_000)  # an hour back
    assert not clock.wants(-3_600_000_000_000 + 50_000_000)
    assert clock.wants(-3_600_000_000_000 + 100_000_000)


def test_bad_options_are_told_together() -> None:
    with pytest.raises(OptionError) as told:
        SourceOptions(rotate=45, crop=(0, 0, 0, 5), fps=0)  # type: ignore[arg-type]
    for words in ("rotate is 45", "crop is (0, 0, 0, 5)", "fps is 0"):
        assert words in str(told.value)


def test_crop_is_read_from_text() -> None:
    assert crop_from_text("1, 2,30,40") == (1, 2, 30, 40)
    with pytest.raises(OptionError, match="expected x,y,width,height"):
        crop_from_text("1,2,3")


def test_closing_the_source_closes_the_reader() -> None:
    reader = Numbered([])
    with FrameSource(reader):
        pass
    assert reader.closed
