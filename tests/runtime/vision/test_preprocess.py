"""Preprocessing equals the checkpoint's own image processor, whatever the picture's shape."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image
from skimage import data
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from engines.errors import BundleError, PictureError
from engines.manifest import Preprocessing
from runtime.vision.geometry import lay_out
from runtime.vision.preprocess import preprocess, preprocess_batch

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PHOTOS = (
    "astronaut", "camera", "chelsea", "clock", "coffee", "coins", "hubble_deep_field",
    "immunohistochemistry", "moon", "page", "retina", "rocket",
)  # fmt: skip


def photograph(name: str) -> np.ndarray:
    pixels = getattr(data, name)()
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def clip_preprocessing(side: int = 336, **changes: object) -> Preprocessing:
    fields = {
        "resize_height": side,
        "resize_width": side,
        "height": side,
        "width": side,
        "rescale_factor": 1 / 255,
        "mean": MEAN,
        "std": STD,
    }
    return Preprocessing.model_validate(fields | changes)


def levels_apart(pixel_values: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference in levels of 255."""
    return float((np.abs(pixel_values - expected).max(axis=(1, 2)) * STD * 255).max())


def expected_values(picture: np.ndarray, side: int, pad: bool) -> np.ndarray:
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = LlavaImageProcessorPil(do_pad=True, **sizes) if pad else None
    processor = processor or CLIPImageProcessorPil(**sizes)
    return np.asarray(processor(Image.fromarray(picture))["pixel_values"][0])


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("side", [336, 64])
@pytest.mark.parametrize("name", PHOTOS)
def test_photographs_equal_the_processor_to_one_level(name: str, side: int, pad: bool) -> None:
    picture = photograph(name)
    got = preprocess(picture, clip_preprocessing(side, pad_to_square=pad))
    expected = expected_values(picture, side, pad)
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert levels_apart(got, expected) <= 1.001
    assert (np.abs(got - expected) > 1e-6).mean() < 0.002


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 30), (40, 2), (333, 501), (501, 333), (20, 20), (337, 336)]
)
def test_odd_shapes_equal_the_processor(shape: tuple[int, int], pad: bool) -> None:
    height, width = shape
    picture = np.ascontiguousarray(photograph("coffee")[:height, :width])
    if height > 400:
        picture = np.ascontiguousarray(photograph("coffee").transpose(1, 0, 2)[:height, :width])
    got = preprocess(picture, clip_preprocessing(pad_to_square=pad))
    assert levels_apart(got, expected_values(picture, 336, pad)) <= 1.001


@pytest.mark.parametrize("crop", [(300, 310), (401, 400), (100, 500)])
def test_a_crop_of_another_size_than_the_resize(crop: tuple[int, int]) -> None:
    height, width = crop
    picture = photograph("chelsea")
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": height, "width": width}
    )
    expected = np.asarray(processor(Image.fromarray(picture))["pixel_values"][0])
    got = preprocess(picture, clip_preprocessing(height=height, width=width))
    assert levels_apart(got, expected) <= 1.001


@pytest.mark.parametrize("resample", ["bilinear", "lanczos", "nearest", "box", "hamming"])
def test_other_filters(resample: str) -> None:
    picture = photograph("coffee")
    processor = CLIPImageProcessorPil(
        size={"height": 336, "width": 336},
        do_center_crop=False,
        resample=Image.Resampling[resample.upper()],
    )
    expected = np.asarray(processor(Image.fromarray(picture))["pixel_values"][0])
    exact = clip_preprocessing(resize="exact", center_crop=False, resample=resample)
    assert levels_apart(preprocess(picture, exact), expected) <= 1.001


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("shape", [(1, 10_000, 3), (10_000, 1, 3)])
def test_a_very_long_picture_needs_little_memory(shape: tuple[int, ...], pad: bool) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    tracemalloc.start()
    values = preprocess(picture, clip_preprocessing(pad_to_square=pad))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values.shape == (3, 336, 336)
    assert peak_bytes < 40e6  # the resized picture would hold 3.4 GB, the padded one 300 MB


def test_a_batch_is_its_pictures_and_a_buffer_is_filled() -> None:
    frames = [photograph("coffee"), photograph("chelsea")]
    preprocessing = clip_preprocessing(56)
    batch = preprocess_batch(frames, preprocessing)
    assert batch.shape == (2, 3, 56, 56)
    for frame, values in zip(frames, batch, strict=True):
        out = np.empty((3, 56, 56), np.float32)
        assert preprocess(frame, preprocessing, out) is out
        np.testing.assert_array_equal(out, values)


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (np.zeros((4, 4, 3), np.float32), r"is float32\[4, 4, 3\].*astype\(np.uint8\)"),
        (np.zeros((4, 4), np.uint8), "Repeat a greyscale"),
        (np.zeros((1, 4, 4, 3), np.uint8), "one by one"),
        (np.zeros((4, 4, 4), np.uint8), "Drop the alpha"),
        (np.zeros((3, 4, 4), np.uint8), "Move the channels last"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        ("photo.jpg", "is a str, expected a NumPy array.*load_picture"),
    ],
)
def test_what_is_not_a_picture(picture: np.ndarray, told: str) -> None:
    with pytest.raises(PictureError, match=told):
        preprocess(picture, clip_preprocessing())


def test_preprocessing_that_misses_the_graphs_size() -> None:
    with pytest.raises(BundleError, match="of 600 x 400 into 504 x 336, but the graph takes 336"):
        lay_out(400, 600, clip_preprocessing(center_crop=False))


def test_geometry_leads_back_to_the_picture() -> None:
    geometry = lay_out(480, 640, clip_preprocessing())
    assert geometry.in_picture(0, 0) == pytest.approx((0, 80), abs=0.5)
    assert geometry.in_picture(336, 336) == pytest.approx((480, 560), abs=0.5)
    padded = lay_out(480, 640, clip_preprocessing(pad_to_square=True))
    assert padded.in_picture(0, 0) == (-80, 0)
    assert padded.in_picture(336, 336) == (560, 640)
