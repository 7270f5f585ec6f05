"""No message, video, bag or stream stops what reads it; frames that come of them are right."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines.errors import SourceError
from runtime.frames import FrameSource, open_source
from runtime.frames.demosaic import PATTERNS, rgb_from_mosaic
from runtime.frames.frame import Capture, ReadErrors
from runtime.frames.reconnect import Reconnecting
from runtime.frames.ros_image import image_from_message
from runtime.frames.stdin import StdinFrames
from tests.faults.attack import run_attack
from tests.faults.scale import FULL, cases

pytest.importorskip("av")
pytest.importorskip("rosbags")
_MODULE = "tests.faults.hostile_frames"


@pytest.mark.parametrize(
    ("kind", "count"),
    [("message", 1000), ("compressed", 300), ("video", 600), ("bag", 600), ("stream", 300)],
)
def test_hostile_frames_are_read_or_counted(kind: str, count: int) -> None:
    tally = run_attack(_MODULE, kind, cases(count))
    print(kind, tally)
    assert not tally.failures, tally.failures
    assert tally.outcomes["taken"]
    assert tally.outcomes["refused"]


def test_no_pixel_format_of_any_small_size_aborts() -> None:
    from tests.faults.hostile_frames import pixel_format_cases

    tally = run_attack(_MODULE, "pixel_format", pixel_format_cases() if FULL else 300)
    print("pixel_format", tally)
    assert not tally.failures, tally.failures


def message_of(pixels: np.ndarray, encoding: str, width: int) -> SimpleNamespace:
    height, step = pixels.shape
    return SimpleNamespace(
        height=height, width=width, step=step, encoding=encoding, is_bigendian=0, data=pixels
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mosaic_of_any_size_is_the_mean_of_its_neighbours(pattern: str) -> None:
    """Against plain loops; odd widths were wrong without a word, odd heights aborted."""
    rng = np.random.default_rng(3)
    sizes = [(h, w) for h in range(2, 10) for w in range(2, 10)] + [(48, 31), (33, 64)]
    for height, width in sizes:
        mosaic = rng.integers(0, 256, (height, width), dtype=np.uint8)
        image = image_from_message(message_of(mosaic, f"bayer_{pattern}8", width))
        np.testing.assert_array_equal(image, mean_of_neighbours(mosaic, pattern))
        np.testing.assert_array_equal(image, rgb_from_mosaic(mosaic, pattern))


def mean_of_neighbours(mosaic: np.ndarray, pattern: str) -> np.ndarray:
    height, width = mosaic.shape
    padded = np.pad(mosaic, 1, mode="reflect").astype(int)
    rgb = np.zeros((height, width, 3), np.uint8)
    for y in range(height):
        for x in range(width):
            around: dict[str, list[int]] = {"r": [], "g": [], "b": []}
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    letter = pattern[(y + down) % 2 * 2 + (x + right) % 2]
                    around[letter].append(padded[y + 1 + down, x + 1 + right])
            here = pattern[y % 2 * 2 + x % 2]
            around[here] = [int(mosaic[y, x])]
            for place, letter in enumerate("rgb"):
                values = around[letter]
                rgb[y, x, place] = (sum(values) + len(values) // 2) // len(values)
    return rgb


@pytest.mark.parametrize("encoding", ["yuv422", "yuv422_yuy2"])
def test_yuv_of_any_size_is_bt_601(encoding: str) -> None:
    rng = np.random.default_rng(4)
    for height in range(1, 8):
        for width in range(2, 20, 2):
            pairs = rng.integers(16, 236, (height, width, 2), dtype=np.uint8)  # brightness, colour
            sent = pairs if encoding.endswith("yuy2") else pairs[..., ::-1]
            image = image_from_message(message_of(sent.reshape(height, -1), encoding, width))
            luma = 1.164383 * (pairs[..., 0].astype(float) - 16)
            cb = np.repeat(pairs[:, 0::2, 1], 2, axis=1).astype(float) - 128
            cr = np.repeat(pairs[:, 1::2, 1], 2, axis=1).astype(float) - 128
            red, blue = luma + 1.596027 * cr, luma + 2.017232 * cb
            expected = np.stack([red, luma - 0.391762 * cb - 0.812968 * cr, blue], axis=-1)
            assert np.abs(image - expected.clip(0, 255)).max() < 4


@pytest.mark.parametrize(
    ("encoding", "height", "width"),
    [
        ("bayer_rggb8", 1, 4),
        ("bayer_bggr8", 4, 1),
        ("yuv422", 2, 3),
        ("rgb8", 0, 4),
        ("mono8", -1, 4),
        ("mono8", 1, 70_000),
    ],
)
def test_sizes_that_mean_nothing_are_refused(encoding: str, height: int, width: int) -> None:
    message = message_of(np.zeros((1, 300_000), np.uint8), encoding, width)
    message.height = height
    with pytest.raises(SourceError, match="Its publisher is at fault"):
        image_from_message(message)


class Failing:
    """A driver that raises what nobody foresaw, and a decoder that does."""

    name, live = "failing", True

    def __init__(self, at: int) -> None:
        self.at = at

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        for number in range(4):
            if number == self.at:
                raise ZeroDivisionError("in the driver")
            yield Capture(number, partial(self.image, number))

    def image(self, number: int) -> np.ndarray:
        if number == 1:
            raise RuntimeError("in the decoder")
        return np.full((2, 2, 3), number, np.uint8)

    def close(self) -> None:
        pass


def test_what_a_driver_or_decoder_raises_is_counted() -> None:
    source = FrameSource(Failing(at=3))
    assert [int(frame.image[0, 0, 0]) for frame in source] == [0, 2]
    assert source.errors.counts == {"undecodable": 1, "source failed": 1}


def test_a_live_source_whose_driver_raises_is_opened_again() -> None:
    openings = iter([Failing(at=0), ValueError("in the opening"), Failing(at=9)])

    def open_reader() -> Failing:
        opened = next(openings)
        if isinstance(opened, Exception):
            raise opened
        return opened

    reader = Reconnecting(open_reader, first_wait_s=0.001)
    source = FrameSource(reader)
    first = next(iter(source))
    assert first.timestamp_ns == 0
    assert source.errors.counts["source failed"] == 1
    assert source.errors.counts["reconnection failed"] == 1


@pytest.mark.parametrize(
    "size", ["100000x100000", "65536x1", "9" * 5000 + "x1", "1x-1", "٤x٤", "+4x4", "4x4\n"]
)
def test_raw_frames_of_no_possible_size_are_refused(size: str) -> None:
    with pytest.raises(SourceError):
        StdinFrames(size, io.BytesIO())


@pytest.mark.parametrize(
    "spec", ["~nosuchuser/x.mp4", "x" * 5000, "a\0b", "/dev/null", "/dev/zero", "?", "", "~"]
)
def test_names_that_are_no_source_are_refused(spec: str) -> None:
    with pytest.raises(SourceError):
        open_source(spec)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nsecret.mkv\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile secret.mkv\n",
    ],
)
def test_a_playlist_named_as_a_video_opens_no_other_file(
    text: str, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    write_video([9, 9], "secret.mkv")
    (tmp_path / "clip.mp4").write_text(text)
    with pytest.raises(SourceError, match="cannot be opened as video"):
        open_source(str(tmp_path / "clip.mp4"))


def test_a_video_of_enormous_frames_is_not_decoded(write_video: Callable[..., Path]) -> None:
    path = write_video([9], "large.mkv", "ffv1", width=9000, height=8000)
    with open_source(str(path)) as source:
        assert list(source) == []
        assert source.errors.counts


def test_the_folder_of_a_bag_may_hold_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "metadata.yaml").write_text("{}")
    os.mkfifo(tmp_path / "log_0.mcap")
    with pytest.raises(SourceError, match="is not a regular file"):
        open_source(str(tmp_path))


def test_the_metadata_of_a_bag_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "metadata.yaml").write_text("[" * 5_000_000)
    with pytest.raises(SourceError, match="expected at most"):
        open_source(str(tmp_path))
