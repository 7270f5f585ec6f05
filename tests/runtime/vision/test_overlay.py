"""The overlay shows every patch where it lies in the picture, by what became of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.bundle import Bundle, open_bundle
from engines.errors import OptionError
from runtime.vision import VisualTokens
from runtime.vision.overlay import (
    DROPPED,
    KEPT,
    MERGED,
    TARGET,
    draw_overlay,
    patch_fates,
    save_overlay,
)
from tests.tiny_bundle import tiny_manifest, write_tiny_bundle

GREY = 200


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny"))


@pytest.fixture
def seen() -> VisualTokens:
    """Return 2 x 2 patches: dropped, merged into token 1, token 0's own, the target of token 1."""
    return VisualTokens(
        tokens=np.zeros((1, 2, 4), np.float32),
        valid=np.array([2]),
        origin=np.array([[2, -1]]),
        assignment=np.array([[-1, -3, 0, 1]]),
        milliseconds={},
    )


def picture(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def test_fates_follow_assignment_and_origin(seen: VisualTokens) -> None:
    fates = patch_fates(seen.assignment[0], seen.origin[0])
    assert fates.kind.tolist() == [DROPPED, MERGED, KEPT, TARGET]
    assert fates.slot.tolist() == [-1, 1, 0, 1]
    assert [fates.count(kind) for kind in (KEPT, TARGET, MERGED, DROPPED)] == [1, 1, 1, 1]


def test_each_patch_is_drawn_in_its_quarter(bundle: Bundle, seen: VisualTokens) -> None:
    page = draw_overlay(picture(800, 800), seen, bundle)
    assert page.shape[1] == 800
    assert page.shape[0] > 800
    dropped, merged = page[200, 200], page[200, 600]
    kept, target = page[600, 200], page[600, 600]
    assert dropped.max() < 90
    assert int(merged.max()) - int(merged.min()) > 40
    assert kept.tolist() == target.tolist() == [GREY] * 3
    assert page[401, 200].tolist() == [255, 255, 255]
    outline = page[401, 600].astype(int)
    assert np.ptp(outline) > 100
    assert outline.argmax() == merged.argmax()


def test_what_the_crop_cuts_off_is_darker_than_what_is_dropped(
    bundle: Bundle, seen: VisualTokens
) -> None:
    page = draw_overlay(picture(800, 1200), seen, bundle)
    assert page[200, 100].max() < page[200, 300].max()  # 100 lies left of the crop
    assert page[600, 300].tolist() == [GREY] * 3


def test_padding_is_not_part_of_the_picture(seen: VisualTokens, tmp_path: Path) -> None:
    fields = tiny_manifest()["preprocessing"] | {"pad_to_square": True}
    bundle = open_bundle(write_tiny_bundle(tmp_path / "padded", preprocessing=fields))
    page = draw_overlay(picture(400, 800), seen, bundle)
    assert page[100, 100].max() < 90  # the upper patches begin above the picture
    assert page[300, 200].tolist() == [GREY] * 3


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 10_000), (10_000, 1), (2000, 3000)])
def test_any_size_of_picture_can_be_drawn(
    bundle: Bundle, seen: VisualTokens, height: int, width: int
) -> None:
    page = draw_overlay(picture(height, width), seen, bundle)
    assert 360 <= page.shape[1] <= 1600
    assert page.shape[0] <= 1700


def test_it_is_written_whole_or_not_at_all(
    bundle: Bundle, seen: VisualTokens, tmp_path: Path
) -> None:
    path = tmp_path / "made/kept.png"
    save_overlay(path, picture(100, 100), seen, bundle)
    with Image.open(path) as image:
        np.testing.assert_array_equal(
            np.asarray(image), draw_overlay(picture(100, 100), seen, bundle)
        )
    assert [entry.name for entry in path.parent.iterdir()] == ["kept.png"]
    with pytest.raises(OptionError, match=r"kept\.jpg is not a \.png file"):
        save_overlay(tmp_path / "kept.jpg", picture(9, 9), seen, bundle)
    with pytest.raises(OptionError, match="cannot be written"):
        save_overlay(path / "kept.png", picture(9, 9), seen, bundle)


def test_reducers_without_groups_or_without_kept_patches(
    bundle: Bundle, seen: VisualTokens
) -> None:
    everything = replace(seen, origin=np.arange(4)[None], assignment=np.arange(4)[None])
    assert draw_overlay(picture(800, 800), everything, bundle)[200, 200].tolist() == [GREY] * 3
    pooled = replace(seen, origin=np.array([[-1, -1]]), assignment=np.array([[-2, -2, -3, -3]]))
    assert np.ptp(draw_overlay(picture(800, 800), pooled, bundle)[200, 200].astype(int)) > 40


def test_marked_patches_are_crossed_out(bundle: Bundle, seen: VisualTokens) -> None:
    plain = draw_overlay(picture(800, 800), seen, bundle)
    marked = draw_overlay(picture(800, 800), seen, bundle, marked=(3,))
    changed = (plain != marked).any(axis=2)
    assert not changed[:398].any()
    assert not changed[:, :398].any()
    red, green, blue = marked[600, 600].tolist()
    assert red > 200 > green + blue
