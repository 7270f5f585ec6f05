"""A graph that takes frames makes of them the pixels that the checkpoint's processor makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from engines.errors import OptionError
from engines.frame_size import FrameSize
from engines.manifest import Preprocessing
from engines.ort import OrtSession
from graphs.frame_input import MODULE, take_frames, write_frame_input
from graphs.modules import module_of
from graphs.operator_check import find_refusals, infer_types
from runtime.vision.preprocess import preprocess
from tests.photographs import load_photographs

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIDE = 112
SIZES = ((378, 672), (480, 640), (640, 480), (1080, 1920), (112, 112))
"""Those of the frames. Ten windows of photographs are tried with each, 50 in all."""


def clip_preprocessing(pad: bool = False, side: int = SIDE, **changes: object) -> Preprocessing:
    fields = {
        "resize_height": side,
        "resize_width": side,
        "height": side,
        "width": side,
        "rescale_factor": 1 / 255,
        "mean": MEAN,
        "std": STD,
        "pad_to_square": pad,
    }
    return Preprocessing.model_validate(fields | changes)


def pixels_graph(side: int = SIDE) -> ir.Model:
    """Return a graph that hands its pixels on."""
    return ir.from_proto(
        onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["" : 18]>
        pixels (float[batch, 3, {side}, {side}] pixel_values)
            => (float[batch, 3, {side}, {side}] seen)
        {{ seen = Identity (pixel_values) }}
    """)
    )


def write_frame_graph(file: Path, size: FrameSize, options: Preprocessing) -> Path:
    ir.save(pixels_graph(options.height), file)
    write_frame_input(file, options, size)
    return file


def frames_of(height: int, width: int, count: int = 10) -> np.ndarray:
    """Return windows of photographs, enlarged where they are smaller: uint8[count, H, W, 3]."""
    random = np.random.default_rng(height)
    photographs = list(load_photographs().values())
    frames = []
    for at in range(count):
        image = Image.fromarray(photographs[(at + height) % len(photographs)])
        scale = max(height / image.height, width / image.width, 1.0) * random.uniform(1.0, 1.5)
        image = image.resize((int(image.width * scale) + 1, int(image.height * scale) + 1))
        top = int(random.integers(0, image.height - height + 1))
        left = int(random.integers(0, image.width - width + 1))
        frames.append(np.asarray(image.crop((left, top, left + width, top + height))))
    return np.stack(frames)


def processor_pixels(frame: np.ndarray, side: int, pad: bool) -> np.ndarray:
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = LlavaImageProcessorPil(do_pad=True, **sizes) if pad else None
    processor = processor or CLIPImageProcessorPil(**sizes)
    return np.asarray(processor(Image.fromarray(frame))["pixel_values"][0])


def levels(pixels: np.ndarray) -> np.ndarray:
    """Return `pixel_values` as levels of 255."""
    return (pixels * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]) * 255


@pytest.mark.parametrize("pad", [False, True], ids=["cropped", "padded"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_photographs_equal_the_processor_to_one_level(
    tmp_path: Path, height: int, width: int, pad: bool
) -> None:
    frames = frames_of(height, width)
    options = clip_preprocessing(pad)
    file = write_frame_graph(tmp_path / "graph.onnx", FrameSize(height, width), options)
    with OrtSession(file) as session:
        assert session.input_names == ("frames",)
        for frame in frames:
            (seen,) = session.run({"frames": frame[None]}).values()
            expected = levels(processor_pixels(frame, SIDE, pad))
            apart = np.abs(levels(seen[0]) - expected)
            assert apart.max() <= 1.001
            assert (apart > 0.5).mean() < 0.001
            ours = levels(preprocess(frame, options))
            assert np.abs(levels(seen[0]) - ours).max() <= 1.001


@pytest.mark.parametrize("resample", ["bilinear", "lanczos", "box", "nearest"])
def test_other_filters_equal_pillow(tmp_path: Path, resample: str) -> None:
    (frame,) = frames_of(60, 90, 1)
    options = clip_preprocessing(side=32, resample=resample)
    file = write_frame_graph(tmp_path / "graph.onnx", FrameSize(60, 90), options)
    with OrtSession(file) as session:
        (seen,) = session.run({"frames": frame[None]}).values()
    assert np.abs(levels(seen[0]) - levels(preprocess(frame, options))).max() <= 1.001


def test_edges_of_black_and_white_are_cut_to_levels_as_pillow_cuts_them(tmp_path: Path) -> None:
    """Bicubic overshoots: without a cut between the axes the second one would carry it on."""
    frame = np.zeros((1, 50, 70, 3), np.uint8)
    frame[:, 20:30, 25:40] = 255
    options = clip_preprocessing(side=100)
    file = write_frame_graph(tmp_path / "graph.onnx", FrameSize(50, 70), options)
    with OrtSession(file) as session:
        (seen,) = session.run({"frames": frame}).values()
    assert np.abs(levels(seen[0]) - levels(preprocess(frame[0], options))).max() <= 1.001


def test_nothing_is_resized_where_the_size_is_right() -> None:
    model = pixels_graph()
    take_frames(model, clip_preprocessing(resize="none"), FrameSize(200, SIDE))
    assert "MatMul" not in {node.op_type for node in model.graph}
    assert "Slice" in {node.op_type for node in model.graph}


def test_tensorrt_takes_every_operator() -> None:
    model = pixels_graph()
    take_frames(model, clip_preprocessing(), FrameSize(378, 672))
    assert find_refusals(infer_types(model), "10.3") == []
    # TensorRT takes uint8 at a network's boundary only, with a Cast right behind.
    (frames,) = model.graph.inputs
    assert frames.dtype is ir.DataType.UINT8
    assert [use.node.op_type for use in frames.uses()] == ["Cast"]
    stage = [node for node in model.graph if module_of(node) == MODULE]
    assert len(stage) == len(list(model.graph)) - 1


def test_a_graph_takes_frames_once() -> None:
    model = pixels_graph()
    take_frames(model, clip_preprocessing(), FrameSize(378, 672))
    with pytest.raises(OptionError, match="takes frames"):
        take_frames(model, clip_preprocessing(), FrameSize(378, 672))


def test_a_crop_larger_than_the_picture_is_refused() -> None:
    options = clip_preprocessing(resize_height=100, resize_width=100)
    with pytest.raises(OptionError, match="fills no borders"):
        take_frames(pixels_graph(), options, FrameSize(200, 200))
