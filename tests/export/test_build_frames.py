"""Bundles whose graphs take camera frames: the same tokens as from pixels, in every precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from calibration.agreement.token_metrics import Gate
from calibration.int8.bundle import calibrate_bundle
from calibration.int8.options import Int8Options
from engines.bundle import Bundle, open_bundle
from engines.errors import FoveateError, OptionError, PictureError
from engines.frame_size import FrameSize, frame_size_of
from engines.ort import open_files
from export.build import BuildOptions, build_bundle
from export.checkpoint.llava import open_checkpoint
from export.language.language_models import DecoderOptions
from export.verify.sides import refuse_other_checkpoint
from runtime.model import open_model
from runtime.model_repository.repository import write_repository
from runtime.vision import VisionEncoder
from tests.graphs.test_frame_input import frames_of

SIZE = FrameSize(90, 120)
Build = Callable[..., Bundle]


@pytest.fixture(scope="module")
def build(language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    built: dict[str, Bundle] = {}

    def make(**changes: object) -> Bundle:
        if repr(changes) not in built:
            out = tmp_path_factory.mktemp("frames") / "bundle"
            fields = {"tokens": (8,), "decoders": DecoderOptions(precision="fp32")} | changes
            build_bundle(BuildOptions(str(language_checkpoint), out, **fields))  # type: ignore[arg-type]
            built[repr(changes)] = open_bundle(out)
        return built[repr(changes)]

    return make


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drive")
    for at, frame in enumerate(frames_of(90, 120, 24)):
        Image.fromarray(frame).save(folder / f"{at}.png")
    return folder


def with_frames(build: Build, **changes: object) -> Bundle:
    return build(graph_input="uint8", frame=SIZE, **changes)


def assert_same(pixels: Bundle, frames: Bundle, tokens: int, least_kept: float = 1.0) -> None:
    """Encode 50 photographs with both and compare what is kept and the tokens."""
    kept = []
    with VisionEncoder(pixels, tokens=tokens) as one, VisionEncoder(frames, tokens=tokens) as two:
        assert one.frame_size is None
        assert two.frame_size == SIZE
        for frame in frames_of(90, 120, 50):
            wanted, got = one.encode([frame]), two.encode([frame])
            kept.append(np.array_equal(wanted.origin, got.origin))
            if kept[-1]:
                error = np.linalg.norm(got.tokens - wanted.tokens) / np.linalg.norm(wanted.tokens)
                assert error <= 1e-3 or least_kept < 1.0
    assert np.mean(kept) >= least_kept


def test_one_graph_says_the_same(build: Build) -> None:
    assert_same(build(), with_frames(build), 8)


@pytest.mark.parametrize("tokens", [8, 16])
def test_a_shared_tower_says_the_same(build: Build, tokens: int) -> None:
    both = (8, "all")
    frames = with_frames(build, tokens=both)
    assert frames.manifest.shared is not None
    assert frame_size_of(frames.manifest.shared.tower) == SIZE
    assert_same(build(tokens=both), frames, tokens)


def test_int8_is_calibrated_on_pixels(build: Build, drive: Path) -> None:
    changes = {
        "precision": "int8",
        "int8": Int8Options(frames=str(drive), gate=Gate(0.0, 0.0)),
    }
    # A level more or less may cross a step of INT8, so a few patches may differ.
    assert_same(build(**changes), with_frames(build, **changes), 8, least_kept=0.9)


def test_fp16_and_the_rules_of_tensorrt(build: Build) -> None:
    frames = with_frames(build, precision="fp16", target="jetson-orin")
    assert frame_size_of(frames.manifest.vision[0]) == SIZE


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_visual_tokens_in_half(build: Build, precision: str) -> None:
    changes = {"tokens": (8, "all"), "precision": precision, "target": "rtx-4090"}
    whole, half = build(**changes), build(**changes, graph_output="fp16")
    last = half.stages(half.vision(8))[-1]
    assert [one.dtype for one in last.outputs] == ["float16"]
    model = ir.load(half.path(last.file))
    assert model.graph.outputs[0].dtype is ir.DataType.FLOAT16
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == 1  # to float16: of what comes in, or of what goes out
    (frame,) = frames_of(90, 120, 1)
    # This machine may lack the engine of the target; the graph runs on the CPU all the same.
    for bundle in (whole, half):
        assert bundle.manifest.target == "rtx-4090"
    seen = []
    for bundle in (whole, half):
        files = [bundle.path(one.file) for one in bundle.stages(bundle.vision(8))]
        with VisionEncoder(bundle, open_files(files, threads=1), tokens=8) as encoder:
            seen.append(encoder.encode([frame]))
    np.testing.assert_array_equal(seen[0].origin, seen[1].origin)
    assert seen[1].tokens.dtype == np.float32
    np.testing.assert_array_equal(seen[0].tokens.astype(np.float16), seen[1].tokens)


def test_frames_in_and_half_out_of_one_graph(build: Build) -> None:
    both = with_frames(build, graph_output="fp16")
    (graph,) = both.manifest.vision
    assert (graph.inputs[0].dtype, graph.outputs[0].dtype) == ("uint8", "float16")
    (frame,) = frames_of(90, 120, 1)
    with VisionEncoder(both) as one, VisionEncoder(with_frames(build)) as other:
        wanted = other.encode([frame]).tokens.astype(np.float16)
        np.testing.assert_array_equal(one.encode([frame]).tokens, wanted)


def test_a_frame_of_the_same_shape_is_resized_and_another_refused(build: Build) -> None:
    (large,) = frames_of(180, 240, 1)
    with VisionEncoder(with_frames(build)) as encoder:
        small = np.asarray(Image.fromarray(large).resize((120, 90), Image.Resampling.BICUBIC))
        seen, expected = encoder.encode([large]), encoder.encode([small])
        np.testing.assert_array_equal(seen.tokens, expected.tokens)
        batch = encoder.encode([large, small])
        np.testing.assert_allclose(batch.tokens[1], expected.tokens[0], atol=1e-5)
        with pytest.raises(PictureError, match=r"90 x 120.*--frame 120x90"):
            encoder.encode([np.zeros((120, 90, 3), np.uint8)])


def test_a_camera_frame_is_not_copied() -> None:
    from runtime.vision.preprocess import frames_batch

    (frame,) = frames_of(90, 120, 1)
    assert np.shares_memory(frames_batch([frame], SIZE), frame)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"graph_input": "uint8"}, "--input uint8 without --frame"),
        ({"frame": SIZE}, "without --input uint8"),
    ],
)
def test_refusals_leave_nothing(
    language_checkpoint: Path, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    with pytest.raises(FoveateError, match=says):
        build_bundle(BuildOptions(str(language_checkpoint), tmp_path / "bundle", **change))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_model_warms_up_with_a_frame(build: Build) -> None:
    with open_model(with_frames(build)) as model:
        assert model.warm_up() > 0


def test_such_a_bundle_is_neither_calibrated_nor_verified_nor_served_by_triton(
    build: Build, language_checkpoint: Path, drive: Path, tmp_path: Path
) -> None:
    frames = with_frames(build)
    with pytest.raises(OptionError, match="takes camera frames, and calibration"):
        calibrate_bundle(frames, tmp_path / "out", Int8Options(frames=str(drive)))
    with pytest.raises(OptionError, match="takes camera frames of one size"):
        write_repository(frames, tmp_path / "repository")
    with pytest.raises(OptionError, match="takes camera frames of one size"):
        refuse_other_checkpoint(frames, open_checkpoint(str(language_checkpoint)))
