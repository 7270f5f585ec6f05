"""Every kind of picture file becomes upright RGB, or one paragraph that says why not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from engines.errors import PictureError
from runtime import picture_limits
from runtime.vision.pictures import load_picture, picture_from_bytes


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.coffee()).resize((60, 40))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_lossless_files_keep_their_pixels(photo: Image.Image, file_format: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    pixels = picture_from_bytes(encoded(photo, file_format, **options))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(photo))


def test_a_path_is_read(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.jpg")
    assert load_picture(tmp_path / "photo.jpg").shape == (40, 60, 3)


def test_exif_orientation_is_applied(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: to be shown rotated clockwise
    pixels = picture_from_bytes(encoded(photo, exif=exif))
    np.testing.assert_array_equal(pixels, np.rot90(np.asarray(photo), -1))


def test_greyscale_palette_and_cmyk(photo: Image.Image) -> None:
    grey = photo.convert("L")
    expected = np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(picture_from_bytes(encoded(grey)), expected)
    palette = photo.convert("P")
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(picture_from_bytes(encoded(palette)), expected)
    cmyk = picture_from_bytes(encoded(photo.convert("CMYK"), "TIFF"))
    assert np.abs(cmyk.astype(int) - np.asarray(photo)).max() <= 1


def test_alpha_is_composited_on_white_as_the_processor_does(photo: Image.Image) -> None:
    from transformers.image_transforms import convert_to_rgb

    photo = photo.copy()
    photo.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))))
    pixels = picture_from_bytes(encoded(photo))
    np.testing.assert_array_equal(pixels, convert_to_rgb(photo, return_numpy=True))
    np.testing.assert_array_equal(pixels[:, 0], 255)


def test_sixteen_bits_keep_the_high_byte() -> None:
    wide = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 7
    pixels = picture_from_bytes(encoded(Image.fromarray(wide)))
    np.testing.assert_array_equal(pixels[:, :, 0], np.arange(256).reshape(16, 16))


def test_an_animation_gives_its_first_frame(photo: Image.Image) -> None:
    black = Image.new("RGB", photo.size)
    film = encoded(black, "GIF", save_all=True, append_images=[photo, photo])
    assert not picture_from_bytes(film).any()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (10_000, 1), (1, 10_000)])
def test_extreme_shapes_are_pictures(width: int, height: int) -> None:
    pixels = picture_from_bytes(encoded(Image.new("RGB", (width, height), (9, 8, 7))))
    assert pixels.shape == (height, width, 3)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_file_is_told(photo: Image.Image, file_format: str, share: float) -> None:
    whole = encoded(photo, file_format)
    with pytest.raises(PictureError) as caught:
        picture_from_bytes(whole[: int(len(whole) * share)], "cut.jpg")
    assert str(caught.value).startswith("cut.jpg is ")
    assert "\n" not in str(caught.value)


def test_what_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"nowhere\.jpg does not exist"):
        load_picture(tmp_path / "nowhere.jpg")
    with pytest.raises(PictureError, match="cannot be read"):
        load_picture(tmp_path)
    with pytest.raises(PictureError, match="is empty"):
        picture_from_bytes(b"")
    with pytest.raises(
        PictureError, match=r"is not a picture Foveate reads .*Expected one of JPEG"
    ):
        picture_from_bytes(b"%PDF-1.4 and so on")
    with pytest.raises(PictureError, match="32-bit pixels"):
        picture_from_bytes(encoded(Image.new("F", (4, 4)), "TIFF"))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = encoded(Image.new("1", (1000, 1000)))
    monkeypatch.setattr(picture_limits, "MAX_PIXELS", 999_999)
    with pytest.raises(PictureError, match=r"1000 x 1000 pixels, expected at most 999,999"):
        picture_from_bytes(small)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)
    with pytest.raises(PictureError, match="more pixels than Pillow decodes"):
        picture_from_bytes(small)
