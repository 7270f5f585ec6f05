"""Frames that are cut into tiles: which of their squares are calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from calibration.frames.dataset import CalibrationSet, FrameOptions, collect_frames
from calibration.frames.distinct_frames import DistinctFrames, most_squares
from engines.picture_tiles import PictureTiles
from runtime.frames.frame_sampler import EvenSample
from runtime.vision.layouts import Layout, layout_from
from runtime.vision.parallel_resize import ALONE
from tests.calibration.conftest import drive_over, make_preprocessing
from tests.photographs import load_photographs

SIDE = 56
PREPROCESSING = make_preprocessing(SIDE)
SHAPES = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 3))


@pytest.fixture(scope="module")
def layout() -> Layout:
    """Up to nine tiles of 56 pixels."""
    tiles = PictureTiles(
        side=SIDE,
        resolutions=tuple((SIDE * rows, SIDE * columns) for rows, columns in SHAPES),
        newline="newline.safetensors",
    )
    return layout_from(PREPROCESSING, tiles, (4, 4))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Of one, two, four and nine tiles in turn."""
    windows = drive_over(load_photographs()["astronaut.png"], 24, 180)
    sizes = ((50, 50), (50, 100), (112, 112), (180, 180))
    return [window[: sizes[at % 4][0], : sizes[at % 4][1]] for at, window in enumerate(windows)]


@pytest.fixture(scope="module")
def frames(
    pictures: list[np.ndarray], layout: Layout, write_folder: Callable[..., Path]
) -> CalibrationSet:
    folder = write_folder(pictures)
    return collect_frames(
        str(folder), PREPROCESSING, cut=lambda picture: layout.squares(picture, ALONE)
    )


def test_the_squares_are_those_that_the_runtime_cuts(frames, pictures, layout) -> None:
    pixels = iter(frames)
    for picture, squares in zip(pictures, frames.frames, strict=True):
        cut = layout.pixel_values([picture], ALONE)  # the view first, then the tiles
        places = [
            [at for at, one in enumerate(cut) if np.array_equal(one, next_[0])]
            for next_ in (next(pixels) for _ in squares)
        ]
        assert 0 in places[0]
        assert all(found for found in places)
        assert len({found[-1] for found in places[1:]}) == len(places) - 1, "no tile comes twice"


def test_no_frame_gives_many_more_than_another(frames) -> None:
    assert frames.counts[:4] == (2, 3, 5, 5), "of 2, 3, 5 and 10 squares"
    assert len(frames) == sum(frames.counts) > len(frames.frames) == 24
    assert frames.describe() == f"{len(frames)} squares of 24 frames"


def test_a_tile_does_not_hold_the_picture_it_was_cut_from(frames) -> None:
    for square in frames.pictures:
        whole = square if square.base is None else square.base
        assert memoryview(whole).nbytes == square.nbytes


def test_the_sets_share_no_frame(frames) -> None:
    sets = frames.split()
    parts = (sets.calibration, sets.search, sets.gate, sets.report)
    assert [len(part.frames) for part in parts] == [15, 3, 3, 3]
    assert sum(map(len, parts)) == len(frames)
    owners = {id(squares): at for at, squares in enumerate(frames.frames)}
    found = [{owners[id(squares)] for squares in part.frames} for part in parts]
    assert sorted(at for part in found for at in part) == list(range(24))


def shade(number: int) -> np.ndarray:
    picture = np.full((8, 8, 3), number % 200, np.uint8)
    picture[: 1 + number % 7, :4] = number * 37 % 256
    picture[:, 1 + number // 7 % 7 :] ^= number * 101 % 256
    return picture


def looked_at(frames: int, most: int, tiles: int = 36) -> Iterator[DistinctFrames]:
    """Yield a sample after each of many frames; a tile is grey, and its level is its number."""
    sample = DistinctFrames(most)
    for number in range(frames):
        if sample.wants_next():
            numbered = [np.full((8, 8, 3), at, np.uint8) for at in range(tiles)]
            sample.look_at([shade(number), *numbered])
            yield sample


@pytest.mark.parametrize(
    ("frames", "most", "each"), [(20, 64, 5), (120, 256, 4), (300, 64, 4), (600, 200, 2)]
)
def test_there_are_as_many_of_each_as_there_is_room_for(frames: int, most: int, each: int) -> None:
    largest = 0
    for sample in looked_at(frames, most):
        largest = max(largest, sum(len(one.squares) for one in sample.kept))
    kept = sample.items()
    assert {len(one.squares) for one in kept} == {each}
    assert sum(len(one.squares) for one in kept) <= most_squares(most)
    assert largest <= max(512, 2 * 2 * most), "while they are read"


def test_tiles_of_every_place_come_into_every_set() -> None:
    *_, sample = looked_at(256, 256, tiles=4)
    kept = sample.items()
    assert len(kept) > 200
    for turn in range(8):
        tiles = [int(one.squares[1][0, 0, 0]) for one in kept[turn::8]]
        assert set(tiles) == {0, 1, 2, 3}


def test_the_same_frames_give_the_same_squares() -> None:
    def squares(sample: EvenSample) -> Sequence[bytes]:
        return [square.tobytes() for frame in sample.items() for square in frame.squares]

    *_, first = looked_at(40, 16)
    *_, again = looked_at(40, 16)
    assert squares(first) == squares(again)


@pytest.mark.parametrize(("frames", "squares"), [(8, 40), (128, 512), (256, 512), (400, 800)])
def test_how_many_squares_a_build_reckons_with(frames: int, squares: int) -> None:
    assert most_squares(frames) == squares


def test_a_limit_of_frames_is_one_of_frames(pictures, layout, write_folder) -> None:
    folder = write_folder(pictures)
    found = collect_frames(
        str(folder),
        PREPROCESSING,
        FrameOptions(max_frames=9),
        cut=lambda picture: layout.squares(picture, ALONE),
    )
    assert len(found.frames) == 9
    assert len(found) > 9
