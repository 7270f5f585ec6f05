"""Resizing in bands equals resizing in one piece, and resizing a part equals cutting the whole."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from engines.manifest import Preprocessing
from runtime.vision import resize as resize_module
from runtime.vision.parallel_resize import ALONE, Bands
from runtime.vision.preprocess import preprocess, resize_picture

FILTERS = ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")


@pytest.fixture(autouse=True, scope="module")
def tiny_bands() -> None:
    """Let small pictures, too, be resized in many bands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resize_module, "_LEAST_PIXELS", 16)
        patch.setattr(resize_module, "_MOST_PIXELS", 512)
        yield


@pytest.fixture(scope="module")
def four() -> Bands:
    with Bands(4) as bands:
        yield bands


def preprocessing_of(
    size: tuple[int, int], crop: tuple[int, int], **fields: object
) -> Preprocessing:
    return Preprocessing.model_validate(
        {
            "resize_height": size[0],
            "resize_width": size[1],
            "height": crop[0],
            "width": crop[1],
            "rescale_factor": 1 / 255,
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.2, 0.2),
        }
        | fields
    )


def hard_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Black and white at random: every rounding and clipping shows."""
    return np.random.default_rng(seed).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255


sides = st.integers(1, 90)
pairs = st.tuples(sides, sides)


@settings(max_examples=150, deadline=None)
@given(pairs, pairs, st.sampled_from(FILTERS))
def test_a_whole_picture_in_bands_is_what_pillow_makes_of_it(
    four: Bands, size: tuple[int, int], resized: tuple[int, int], resample: str
) -> None:
    picture = hard_picture(*size)
    options = preprocessing_of(resized, resized, resize="exact", resample=resample)
    whole = Image.fromarray(picture).resize(resized[::-1], Image.Resampling[resample.upper()])
    np.testing.assert_array_equal(resize_picture(picture, options, four), np.asarray(whole))


@settings(max_examples=150, deadline=None)
@given(pairs, pairs, pairs, st.sampled_from(FILTERS), st.booleans())
def test_a_part_in_bands_is_the_part_in_one_piece(
    four: Bands,
    size: tuple[int, int],
    resized: tuple[int, int],
    crop: tuple[int, int],
    resample: str,
    pad: bool,
) -> None:
    picture = hard_picture(*size)
    options = preprocessing_of(resized, crop, resize="exact", resample=resample, pad_to_square=pad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resize_module, "_MOST_PIXELS", 1 << 22)
        alone = resize_picture(picture, options, ALONE)
    np.testing.assert_array_equal(resize_picture(picture, options, four), alone)


@settings(max_examples=100, deadline=None)
@given(pairs, st.tuples(st.integers(2, 60), st.integers(2, 60)), st.booleans())
def test_a_part_is_what_is_cut_from_the_whole(
    size: tuple[int, int], resized: tuple[int, int], pad: bool
) -> None:
    """To 2 levels of 255, and nearly everywhere to none: Pillow takes a part's edges as float32."""
    picture = hard_picture(*size)
    crop = (max(resized[0] // 2, 1), max(resized[1] // 2, 1))
    top, left = (resized[0] - crop[0]) // 2, (resized[1] - crop[1]) // 2
    options = {"resize": "exact", "pad_to_square": pad}
    part = resize_picture(picture, preprocessing_of(resized, crop, **options))
    whole = resize_picture(picture, preprocessing_of(resized, resized, **options))
    cut = whole[top : top + crop[0], left : left + crop[1]]
    assert np.abs(part.astype(int) - cut).max() <= 2


@pytest.mark.parametrize("shape", [(700, 90), (300, 140), (140, 300), (64, 640)])
def test_long_pictures_equal_the_processor(shape: tuple[int, int]) -> None:
    """Of those more than twice as high as wide, Pillow 13 resizes the rows first."""
    picture = hard_picture(*shape)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_normalize=False
    )
    expected = np.asarray(processor(Image.fromarray(picture))["pixel_values"][0]) * 255  # [3, H, W]
    got = resize_picture(picture, preprocessing_of((56, 56), (56, 56)))
    assert np.abs(got.transpose(2, 0, 1) - expected).max() <= 1.001


def test_views_are_read_where_they_lie() -> None:
    options = preprocessing_of((40, 40), (40, 40))
    large = hard_picture(200, 300)
    views = {
        "a part": large[20:150, 33:201],
        "OpenCV's order": large[:, :, ::-1],
        "a part in OpenCV's order": large[7:, 5:-9, ::-1],
        "upside down": large[::-1],
        "turned by 90 degrees": np.rot90(large),
        "turned by 180 degrees": np.rot90(large, 2),
        "three of four bytes": np.dstack([large, large])[:, :, 1:4],
        "one row": large[5:6],
        "one column": large[:, 5:6],
        "every second pixel": large[:, ::2],
        "one row again and again": np.broadcast_to(large[:1], (50, 300, 3)),
    }
    for name, view in views.items():
        expected = preprocess(np.array(view, order="C"), options)
        np.testing.assert_array_equal(preprocess(view, options), expected, err_msg=name)


@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 9))
def test_bands_are_the_whole_together(start: int, length: int, count: int) -> None:
    count = min(count, length)
    seen: list[slice] = []
    with Bands(3) as bands:
        bands.run(seen.append, slice(start, start + length), count)
    assert len(seen) == count
    indices = sorted(index for band in seen for index in range(band.start, band.stop))
    assert indices == list(range(start, start + length))


def test_bands_run_side_by_side_and_errors_come_back() -> None:
    meeting = threading.Barrier(3, timeout=10)
    with Bands(3) as bands:
        bands.run(lambda _: meeting.wait(), slice(0, 3), 3)  # only three at once get past it

        def fail(band: slice) -> None:
            raise ValueError(f"band {band.start}")

        with pytest.raises(ValueError, match="band"):
            bands.run(fail, slice(0, 3), 3)
    here = []
    ALONE.run(lambda _: here.append(threading.current_thread()), slice(0, 4), 4)
    assert here == [threading.current_thread()] * 4


def test_nobody_waits_for_a_thread_that_has_not_begun() -> None:
    """On a busy machine the caller has done every band before another thread gets its turn."""
    busy, finish = threading.Barrier(4), threading.Event()
    with Bands(4) as bands:

        def occupy() -> None:
            busy.wait(timeout=10)
            finish.wait(timeout=10)

        others = [bands._opened().submit(occupy) for _ in range(3)]
        busy.wait(timeout=10)
        seen: list[slice] = []
        bands.run(seen.append, slice(0, 8), 4)
        finish.set()
        assert [band.start for band in seen] == [0, 2, 4, 6]
        assert not any(other.exception() for other in others)


def test_bands_start_no_more_threads_than_they_use() -> None:
    """A thread that was used once keeps its share of the heap: three for one helper is a leak."""
    taken, release = threading.Event(), threading.Event()

    def wait(_: slice) -> None:
        if threading.current_thread().name.startswith("bands"):
            taken.set()
            release.wait(10)
        else:
            taken.wait(10)

    others = set(threading.enumerate())
    with Bands(2) as bands:
        busy = threading.Thread(target=bands.run, args=(wait, slice(0, 2), 2))
        busy.start()
        taken.wait(10)
        bands.run(lambda _: None, slice(0, 2), 2)
        names = [thread.name for thread in set(threading.enumerate()) - others]
        release.set()
        busy.join(10)
    assert sum(name.startswith("bands") for name in names) == 1
