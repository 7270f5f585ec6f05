"""Frames in: folders, videos, bags and cameras become calibration sets, or are refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.frames.dataset import FrameOptions, collect_frames
from engines.errors import OptionError, SourceError
from runtime.frames import FrameSource, SourceOptions
from runtime.frames.frame import Capture, ReadErrors
from runtime.vision.preprocess import preprocess
from tests.calibration.conftest import drive_over, make_preprocessing
from tests.photographs import load_photographs

PREPROCESSING = make_preprocessing()


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return load_photographs()["astronaut.png"]


def shade(level: int, side: int = 64) -> np.ndarray:
    return np.full((side, side, 3), level, np.uint8)


class Shades:
    """A reader that gives grey frames and remembers which of them were decoded."""

    name = "shades"

    def __init__(self, levels: list[int], live: bool = False) -> None:
        self.levels, self.live = levels, live
        self.decoded: list[int] = []
        self.closed = False

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        for number, level in enumerate(self.levels):
            if self.closed:
                return
            yield Capture(number * 10**8, partial(self._decode, number, level))

    def _decode(self, number: int, level: int) -> np.ndarray:
        self.decoded.append(number)
        if level < 0:
            raise SourceError("damaged")
        # Each number leaves its own mark, so that no two frames are the same picture.
        picture = shade(level)
        picture[8 * (number % 8) :, :32] = number * 37 % 256
        picture[:, 8 * (number // 8 % 8) :] ^= number * 101 % 256
        return picture

    def close(self) -> None:
        self.closed = True


def test_a_folder_becomes_what_the_tower_sees(
    photograph: np.ndarray, write_folder: Callable[..., Path]
) -> None:
    pictures = drive_over(photograph, 12)
    frames = collect_frames(str(write_folder(pictures)), PREPROCESSING)
    assert len(frames) == 12
    for found, picture in zip(frames, pictures, strict=True):
        assert found.shape == (1, 3, 56, 56)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found[0], preprocess(picture, PREPROCESSING))
    assert len(list(frames)) == 12, "a set can be gone through again"


def test_a_video_is_sampled_over_the_whole_of_it(
    photograph: np.ndarray, write_clip: Callable[..., Path]
) -> None:
    clip = write_clip(drive_over(photograph, 90))
    told: list[tuple[int, int]] = []
    options = FrameOptions(max_frames=10)
    frames = collect_frames(str(clip), PREPROCESSING, options, lambda *now: told.append(now))
    assert len(frames) == 10
    assert frames.coverage.seen == 90
    assert told[-1][1] == 10
    everything = collect_frames(str(clip), PREPROCESSING)
    places = [
        int(np.argmin([np.abs(p.astype(int) - q).mean() for q in everything.pictures]))
        for p in frames.pictures
    ]
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] >= 0.85 * len(everything)
    assert np.diff(places).max() <= 3 * np.diff(places).min() + 3


def test_a_bag_through_its_topic(
    photograph: np.ndarray, write_bag: Callable[..., Path], make_message: Callable[..., object]
) -> None:
    views = drive_over(photograph, 6)
    bag = write_bag(
        [("/front", n, make_message(view)) for n, view in enumerate(views)]
        + [("/rear", n, make_message(views[0])) for n in range(6)]
    )
    with pytest.raises(SourceError, match="has 2 image topics"):
        collect_frames(str(bag), PREPROCESSING)
    options = FrameOptions(view=SourceOptions(topic="/front", rotate=180))
    frames = collect_frames(str(bag), PREPROCESSING, options)
    assert len(frames) == 6
    turned = np.ascontiguousarray(views[3][::-1, ::-1])
    np.testing.assert_array_equal(list(frames)[3][0], preprocess(turned, PREPROCESSING))


def test_frames_that_are_not_wanted_are_not_decoded() -> None:
    reader = Shades([n % 200 + 20 for n in range(500)])
    frames = collect_frames(FrameSource(reader), PREPROCESSING, FrameOptions(max_frames=8))
    assert len(frames) == 8
    assert len(reader.decoded) < 100
    assert reader.closed
    assert max(reader.decoded) > 450


def test_the_same_picture_is_kept_once(
    photograph: np.ndarray, write_folder: Callable[..., Path]
) -> None:
    views = drive_over(photograph, 5)
    noise = np.random.default_rng(0).normal(0, 4, views[0].shape)
    again = [np.clip(view + noise, 0, 255).astype(np.uint8) for view in views]
    frames = collect_frames(str(write_folder(views + again)), PREPROCESSING)
    assert len(frames) == 5
    assert frames.coverage.repeated == 5
    assert frames.coverage.read == 10


def test_something_small_that_moves_makes_another_picture(
    write_folder: Callable[..., Path],
) -> None:
    frames = [shade(100) for _ in range(4)]
    for number, frame in enumerate(frames):
        frame[30:36, 12 * number : 12 * number + 6] = 220
    assert len(collect_frames(str(write_folder(frames)), PREPROCESSING)) == 4


def test_unreadable_frames_are_counted_and_too_many_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(19):
        noise = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    (tmp_path / "bad0.png").write_bytes(b"not a picture")
    frames = collect_frames(str(tmp_path), PREPROCESSING)
    assert frames.coverage.unreadable == {"undecodable": 1}
    for number in range(1, 4):
        (tmp_path / f"bad{number}.png").write_bytes(b"not a picture")
    with pytest.raises(SourceError, match=r"17% of its frames cannot be used \(4 undecodable"):
        collect_frames(str(tmp_path), PREPROCESSING)


def test_frames_smaller_than_a_patch_are_refused(write_folder: Callable[..., Path]) -> None:
    folder = write_folder([shade(n, side=10) for n in range(0, 250, 50)])
    with pytest.raises(SourceError, match=r"5 smaller than a patch.*10x10 pixels.*alone is 14"):
        collect_frames(str(folder), PREPROCESSING)


def test_an_empty_folder_and_a_single_picture_are_refused(
    tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    with pytest.raises(SourceError, match="has no pictures in it"):
        collect_frames(str(tmp_path), PREPROCESSING)
    with pytest.raises(SourceError, match=r"has 1 distinct frames \(3 read, 2 of them the same"):
        collect_frames(str(write_folder([shade(9)] * 3)), PREPROCESSING)
    with pytest.raises(OptionError, match="max_frames is 1"):
        FrameOptions(max_frames=1)


def test_a_camera_ends_when_there_are_enough() -> None:
    reader = Shades([n % 200 + 20 for n in range(10**6)], live=True)
    options = FrameOptions(max_frames=5, view=SourceOptions(fps=1000.0))
    assert len(collect_frames(FrameSource(reader), PREPROCESSING, options)) == 5
    assert reader.closed


def test_a_camera_that_stands_still_ends_in_time() -> None:
    class Still(Shades):
        def captures(self, errors: ReadErrors) -> Iterator[Capture]:
            while not self.closed:
                time.sleep(0.002)
                yield Capture(time.time_ns(), partial(self._decode, len(self.decoded) % 2, 90))

    options = FrameOptions(live_s=0.3, view=SourceOptions(fps=1000.0))
    frames = collect_frames(FrameSource(Still([], live=True)), PREPROCESSING, options)
    assert len(frames) == 2
    assert frames.coverage.repeated > 5


def test_the_digest_names_every_pixel_and_their_order(
    photograph: np.ndarray, write_folder: Callable[..., Path]
) -> None:
    views = drive_over(photograph, 4, side=56)
    digest = collect_frames(str(write_folder(views)), PREPROCESSING).digest
    assert digest == collect_frames(str(write_folder(views)), PREPROCESSING).digest
    assert digest != collect_frames(str(write_folder(views[::-1])), PREPROCESSING).digest
    views = [view.copy() for view in views]
    views[2][5, 7, 1] ^= 1
    assert digest != collect_frames(str(write_folder(views)), PREPROCESSING).digest


@pytest.mark.parametrize("count", [8, 16, 21])
def test_every_eighth_frame_is_held_out(count: int) -> None:
    reader = Shades([n * 9 % 200 + 20 for n in range(count)])
    frames = collect_frames(FrameSource(reader), PREPROCESSING)
    sets = frames.split()
    parts = (sets.calibration, sets.search, sets.gate, sets.report)
    for held_out in parts[1:]:
        assert len(held_out) in (len(frames) // 8, -(-len(frames) // 8))
    assert sum(map(len, parts)) == len(frames)
    assert len({p.tobytes() for part in parts for p in part.pictures}) == len(frames)
    assert frames.split().report.digest == sets.report.digest


def test_too_few_frames_to_split_say_how_many_more() -> None:
    frames = collect_frames(FrameSource(Shades([20, 60, 100, 140, 180])), PREPROCESSING)
    with pytest.raises(SourceError, match=r"has 5 distinct frames, .* 3 more are needed"):
        frames.split()
