"""The size of frames: how it is typed, and how a manifest that says nonsense is refused."""

from __future__ import annotations

import pytest

from engines.errors import BundleError, OptionError
from engines.frame_size import FrameSize, frame_size_from_text, frame_size_of
from engines.manifest import Manifest, TensorSpec
from tests.tiny_bundle import tiny_manifest


def test_height_comes_first() -> None:
    assert frame_size_from_text("1080x1920") == FrameSize(1080, 1920)


@pytest.mark.parametrize("text", ["", "1080", "1080x", "0x4", "4x9000", "4x4x3", "-4x4", "axb"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--frame"):
        frame_size_from_text(text)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("float32", ("batch", 4, 4, 3)), ("uint8", ("batch", 4, 4)), ("uint8", ("b", "h", 4, 3))],
)
def test_an_input_that_is_no_frame_is_refused(dtype: str, shape: tuple[int | str, ...]) -> None:
    graph = Manifest.model_validate(tiny_manifest()).vision[0]
    assert frame_size_of(graph) is None
    spec = TensorSpec.model_validate({"name": "frames", "dtype": dtype, "shape": shape})
    with pytest.raises(BundleError, match="expected uint8"):
        frame_size_of(graph.model_copy(update={"inputs": (spec,)}))
