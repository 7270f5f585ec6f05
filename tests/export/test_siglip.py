"""LLaVA over SigLIP, a tower without a class token: parity with transformers and every reducer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from calibration.agreement.graphs import compare_graphs
from calibration.scales.apply import apply_calibration
from calibration.scales.calibrate import CalibrationOptions, calibrate
from calibration.scales.number_format import INT8_IN_HALF
from engines.errors import CheckpointError, OptionError
from engines.frame_size import FrameSize
from engines.ort import OrtSession
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.reducers import REDUCERS, make_reducer
from export.towers import Scoring, TowerOutput
from export.towers.registry import make_tower
from export.verify.reference import VisionReference, observe_tower
from export.vision.to_onnx import export_onnx
from export.vision.vision_module import build_vision_module
from graphs.float16 import convert_to_fp16
from graphs.frame_input import write_frame_input
from graphs.graph_file import HALF_OPSET, set_opset, write_graph
from graphs.operator_check import TENSORRT_OPS
from runtime.vision.preprocess import preprocess_batch
from tests.export.conftest import IMAGE_SIZE, PATCH, WORDS, tiny_text, write_checkpoint
from tests.export.test_vision_module import CASES
from tests.photographs import load_photographs

PATCHES = (IMAGE_SIZE // PATCH) ** 2
PROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "do_resize": True,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def write_siglip_llava(root: Path, **fields: Any) -> Path:
    """Write a LLaVA of random weights over a SigLIP tower with its pooling head."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=tiny_text(),
        image_token_index=WORDS.index("<image>"),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj.weight.data *= 6  # attention far from uniform, as a trained one's
    write_checkpoint(root, model)
    (root / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    file = root / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_siglip_llava(tmp_path_factory.mktemp("siglip") / "llava"))


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray[Any, Any]]:
    return list(load_photographs().values())[:4]


@pytest.fixture(scope="module")
def pixels(checkpoint: Checkpoint, photographs: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return preprocess_batch(photographs, checkpoint.preprocessing)


def test_pixels_are_the_image_processors(checkpoint, photographs, pixels) -> None:
    processor: Any = SiglipImageProcessor(**PROCESSOR)
    pictures = [Image.fromarray(picture) for picture in photographs]
    expected = processor(images=pictures, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixels, expected, atol=1e-5)


def test_all_tokens_are_those_of_transformers(checkpoint, pixels) -> None:
    graph = build_vision_module(checkpoint, make_reducer("none"))
    images = torch.from_numpy(pixels)
    with torch.no_grad():
        expected = torch.stack(checkpoint.llava().get_image_features(images).pooler_output)
        tokens, valid, index, _ = graph(images)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    assert valid.tolist() == [PATCHES] * len(pixels)
    assert index[0].tolist() == list(range(PATCHES))


@pytest.mark.parametrize("layer", [2, 4])
def test_scores_are_the_mean_attention_received(checkpoint, pixels, layer) -> None:
    model: Any = checkpoint.vision_model()
    model.set_attn_implementation("eager")
    images = torch.from_numpy(pixels)
    with torch.no_grad():
        attention = model(images, output_attentions=True).attentions
        seen = make_tower(model, (layer,), Scoring.SELECTED_LAYER)(images)
        last = make_tower(model, (layer,), Scoring.LAST_LAYER)(images)
        expected, _ = observe_tower(model, (layer,), Scoring.LAST_LAYER, images)
    received = attention[layer - 1].mean(dim=2).sum(dim=1)  # [B, P]
    torch.testing.assert_close(seen.scores, received)
    assert received.std() > 0.01, "attention is as good as uniform: the case is too plain"
    assert seen.class_token is None
    assert seen.keys.shape == (len(pixels), PATCHES, 16)
    torch.testing.assert_close(last.scores, expected.scores)
    torch.testing.assert_close(last.keys, expected.keys)


def test_a_graph_takes_frames(checkpoint, tmp_path) -> None:
    """SigLIP's processor makes a square of a frame whatever its shape, with no crop."""
    assert checkpoint.preprocessing.resize == "exact"
    reducer = make_reducer("visionzip", **CASES["visionzip"][1])
    module = build_vision_module(checkpoint, reducer)
    pixels_file = export_onnx(module, tmp_path / "pixels.onnx").file
    frames_file = export_onnx(module, tmp_path / "frames.onnx").file
    height, width = 60, 90
    (frames,) = write_frame_input(frames_file, checkpoint.preprocessing, FrameSize(height, width))
    assert (frames.name, frames.dtype, frames.shape[1:]) == ("frames", "uint8", (height, width, 3))
    windows = [one[10:, 10:][:height, :width] for one in load_photographs().values()]
    with OrtSession(pixels_file, threads=1) as exact, OrtSession(frames_file, threads=1) as session:
        for window in windows:
            theirs = exact.run(
                {"pixel_values": preprocess_batch([window], checkpoint.preprocessing)}
            )
            theirs = {name: value.copy() for name, value in theirs.items()}
            ours = session.run({"frames": np.ascontiguousarray(window)[None]})
            np.testing.assert_array_equal(ours["patch_index"], theirs["patch_index"])
            apart = np.abs(ours["visual_tokens"] - theirs["visual_tokens"]).max()
            assert apart <= 0.02 * np.abs(theirs["visual_tokens"]).max()


@pytest.mark.parametrize(("precision", "overlap"), [("fp16", 0.97), ("mixed", 0.75)])
def test_half_precision_and_int8_keep_patches(checkpoint, tmp_path, precision, overlap) -> None:
    """Random weights score patches nearly alike: INT8 in all layers exchanges some (0.83)."""
    module = build_vision_module(checkpoint, make_reducer("visionzip", **CASES["visionzip"][1]))
    exact = export_onnx(module, tmp_path / "exact.onnx").file
    frames = [
        preprocess_batch([picture[at : at + 120, at : at + 120]], checkpoint.preprocessing)
        for picture in load_photographs().values()
        for at in (0, 40, 80, 120)
    ]
    model = ir.load(exact)
    if precision == "mixed":
        options = CalibrationOptions(threads=1)
        apply_calibration(model, calibrate(exact, frames[::2], options), INT8_IN_HALF)
    set_opset(model, HALF_OPSET)
    convert_to_fp16(model)
    rounded = write_graph(model, tmp_path / "rounded.onnx", opset=HALF_OPSET).file
    agreement = compare_graphs([exact], [rounded], frames[1::2], 1)
    assert agreement.overlap >= overlap
    assert agreement.cosine >= 0.98


@pytest.mark.parametrize("case", CASES)
def test_every_reducer_in_onnx_runtime_equals_pytorch(checkpoint, pixels, tmp_path, case) -> None:
    name, options = CASES[case]
    reducer = make_reducer(name, **options)
    exported = export_onnx(build_vision_module(checkpoint, reducer), tmp_path / "vision.onnx")
    with OrtSession(exported.file, threads=1) as session:
        out = session.run({"pixel_values": pixels})
    expected = VisionReference(checkpoint, reducer).encode(pixels)
    np.testing.assert_array_equal(out["patch_index"], expected.origin)
    np.testing.assert_array_equal(out["assignment"], expected.assignment)
    np.testing.assert_allclose(out["visual_tokens"], expected.tokens, atol=1e-4)


def test_the_pooling_head_stays_out(checkpoint) -> None:
    graph = build_vision_module(checkpoint, make_reducer("none"))
    assert any(name.startswith("head.") for name in checkpoint.vision_model().state_dict())
    assert not any("head." in name or "post_layernorm" in name for name in graph.state_dict())


def test_operators_are_tensorrts(checkpoint, tmp_path) -> None:
    import onnx

    reducer = make_reducer("visionzip", dominant=14, contextual=5)
    exported = export_onnx(build_vision_module(checkpoint, reducer), tmp_path / "vision.onnx")
    model = onnx.load(exported.file, load_external_data=False)
    assert {node.op_type for node in model.graph.node} <= set(TENSORRT_OPS)


def test_visionzip_keeps_as_many_patches_as_it_is_told(checkpoint, pixels) -> None:
    graph = build_vision_module(checkpoint, make_reducer("visionzip", dominant=14, contextual=2))
    with torch.no_grad():
        _, _, index, _ = graph(torch.from_numpy(pixels))
    assert (index >= 0).sum(dim=1).tolist() == [14] * len(pixels)


def test_dropping_the_first_token_is_refused(tmp_path) -> None:
    root = write_siglip_llava(tmp_path / "llava", vision_feature_select_strategy="default")
    with pytest.raises(CheckpointError, match='no class token: expected "full"'):
        open_checkpoint(root)


def test_none_with_a_class_token_is_refused() -> None:
    tower = TowerOutput(torch.zeros(1, 4, 2), torch.zeros(1, 0), torch.zeros(1, 4, 0))
    with pytest.raises(OptionError, match="the tower has no class token"):
        make_reducer("none", class_token=True)(tower)


def test_every_reducer_is_among_the_cases() -> None:
    assert {name for name, _ in CASES.values()} == set(REDUCERS)
