"""Pictures become visual tokens through the bundle's own graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import Bundle, open_bundle
from engines.errors import BundleError, EngineError, OptionError, PictureError
from engines.ort import OrtSession
from runtime.vision import VisionEncoder
from runtime.vision import encoder as encoder_module
from runtime.vision.graph_pool import GraphPool
from runtime.vision.preprocess import preprocess
from tests.tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny"))


def picture(height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_tokens_and_where_they_came_from(bundle: Bundle) -> None:
    with VisionEncoder(bundle, threads=1, tokens=2) as encoder:
        seen = encoder.encode([picture(), picture(30, 20)])
    values = preprocess(picture(), bundle.preprocessing)
    patches = values.reshape(3, 2, 4, 2, 4).mean(axis=(2, 4)).reshape(3, 4).T  # [4, 3]
    np.testing.assert_allclose(seen.tokens[0], patches[2:], atol=1e-6)
    assert seen.tokens.shape == (2, 2, 3)
    assert seen.valid.tolist() == [2, 2]
    assert seen.origin.tolist() == [[2, 3]] * 2
    assert seen.assignment.tolist() == [[-1, -2, 0, 1]] * 2
    assert set(seen.milliseconds) == {"preprocess", "encode"}
    np.testing.assert_array_equal(seen.tokens_of(1), seen.tokens[1])


def test_a_batch_array_is_the_same_as_a_list(bundle: Bundle) -> None:
    with VisionEncoder(bundle) as encoder:
        batch = np.stack([picture(), picture()[::-1]])
        np.testing.assert_array_equal(
            encoder.encode(batch).tokens, encoder.encode(list(batch)).tokens
        )


def test_a_given_session_is_used_and_stays_open(bundle: Bundle) -> None:
    with OrtSession(bundle.path("vision.onnx")) as session:
        with VisionEncoder(bundle, session) as encoder:
            assert encoder.session is session
        with VisionEncoder(bundle, session) as encoder:
            encoder.encode([picture()])


def test_the_number_of_cameras_chooses_the_plan(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def open_session(*_: object, batch: int, **__: object) -> OrtSession:
        asked.append(batch)
        return OrtSession(bundle.path("vision.onnx"))

    monkeypatch.setattr(encoder_module, "open_session", open_session)
    with GraphPool(bundle, batch=4) as pool:
        pool.encoder(pool.budgets[0]).encode([picture()])
    with VisionEncoder(bundle):
        pass
    assert asked == [4, 1]


@pytest.mark.parametrize(
    ("pictures", "told"),
    [
        (picture(), r"uint8\[8, 8, 3\], expected a batch .*image\[None\]"),
        ([], "no images"),
        (picture()[None].astype(np.float32), r"images\[0\] is float32"),
        ([picture(), picture()[:, :, 0]], r"images\[1\] is uint8\[8, 8\]"),
        ("photo.jpg", "is a str"),
    ],
)
def test_what_cannot_be_encoded(bundle: Bundle, pictures: object, told: str) -> None:
    with VisionEncoder(bundle) as encoder, pytest.raises(PictureError, match=told):
        encoder.encode(pictures)  # type: ignore[arg-type]


def test_a_token_count_the_bundle_lacks(bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="no vision graph with 9 visual tokens"):
        VisionEncoder(bundle, tokens=9)


def test_a_graph_without_our_outputs(bundle: Bundle, tmp_path: Path) -> None:
    class Other(OrtSession):
        @property
        def output_names(self) -> tuple[str, ...]:
            return ("logits",)

    with pytest.raises(BundleError, match="and the outputs logits, expected one input and at"):
        VisionEncoder(bundle, Other(bundle.path("vision.onnx")))


@pytest.mark.parametrize(
    ("output", "change", "told"),
    [
        ("visual_tokens", lambda a: np.full_like(a, np.nan), "not finite"),
        (
            "visual_tokens",
            lambda a: a[:, :1],
            r"is \[1, 1, 3\], expected \[1, 2, 3\]",
        ),
        ("valid_count", lambda a: a - 3, "valid_count goes from -1 to -1, expected 0 to 2"),
        ("valid_count", lambda a: a + 1, "valid_count goes from 3 to 3"),
        ("patch_index", lambda a: a + 1, "patch_index goes from 3 to 4, expected -1 to 3"),
        ("assignment", lambda a: a * 9, "assignment goes from -18 to 9, expected -3 to 1"),
    ],
)
def test_what_no_exported_graph_gives(
    bundle: Bundle, output: str, change: Callable[[np.ndarray], np.ndarray], told: str
) -> None:
    class Hostile(OrtSession):
        def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = super().run(inputs)
            return outputs | {output: change(outputs[output])}

    with (
        Hostile(bundle.path("vision.onnx")) as session,
        VisionEncoder(bundle, session) as encoder,
        pytest.raises(EngineError, match=told),
    ):
        encoder.encode([picture()])
