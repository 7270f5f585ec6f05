"""INT8 and FP8 with float16 around them: scales, attention, and what ONNX Runtime makes of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import random_graphs
from calibration.scales.apply import apply_calibration
from calibration.scales.attention import Attention, find_attentions
from calibration.scales.calibrate import CalibrationOptions, calibrate
from calibration.scales.calibration_file import Calibration, load_calibration
from calibration.scales.number_format import FP8, INT8, INT8_IN_HALF, NumberFormat
from engines.ort import OrtSession
from graphs.float16 import convert_to_fp16
from graphs.graph_file import HALF_OPSET, write_graph
from graphs.operator_check import check_graph
from tests.photographs import clip_pixels

OPTIONS = CalibrationOptions(alphas=(0.5,), sample_rows=64, threads=1)
Frame = np.ndarray


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_graphs.write_graph(tmp_path_factory.mktemp("none"), "none")[0]


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return [pixels[None].astype(np.float32) for pixels in clip_pixels(56)[:6]]


@pytest.fixture(scope="module")
def calibration(graph: Path, frames: list[Frame]) -> Calibration:
    return calibrate(graph, frames, OPTIONS)


def quantized(file: Path, calibration: Calibration, form: NumberFormat) -> ir.Model:
    model = ir.load(file)
    apply_calibration(model, calibration, form)
    model.opset_imports[""] = HALF_OPSET
    return model


def run(file: Path, frames: list[Frame]) -> np.ndarray:
    with OrtSession(file, threads=1) as session:
        return np.stack([session.run({"pixel_values": one})["visual_tokens"] for one in frames])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean())


@pytest.mark.parametrize("form", [INT8_IN_HALF, FP8], ids=["int8", "fp8"])
def test_in_half_it_is_near_float32_and_every_tensorrt_takes_it(
    graph: Path,
    calibration: Calibration,
    frames: list[Frame],
    tmp_path: Path,
    form: NumberFormat,
) -> None:
    model = quantized(graph, calibration, form)
    convert_to_fp16(model)
    file = write_graph(model, tmp_path / "q.onnx", opset=HALF_OPSET).file
    for version in ("10.3", "11.4"):
        check_graph(file, version)
    assert cosine(run(graph, frames), run(file, frames)) > 0.995


def test_one_scale_and_the_channels_shares_are_the_scales_of_channels(
    graph: Path, calibration: Calibration, frames: list[Frame], tmp_path: Path
) -> None:
    """The integers and what they stand for are those of one scale for each channel."""
    channels, shared = (quantized(graph, calibration, form) for form in (INT8, INT8_IN_HALF))
    for name, value in channels.graph.initializers.items():
        if not name.endswith(".weight.int8"):
            continue
        layer = name.removesuffix(".weight.int8")
        ours, theirs = (
            {
                what: model.graph.initializers[f"{layer}.weight.{what}"].const_value.numpy()
                for what in whats
            }
            for model, whats in (
                (shared, ("int8", "scale", "channels")),
                (channels, ("int8", "scale")),
            )
        )
        assert ours["scale"].shape == ()
        scales = ours["scale"] * ours["channels"]
        np.testing.assert_allclose(scales, theirs["scale"], rtol=3e-3)
        apart = np.abs(ours["int8"].astype(int) - value.const_value.numpy().astype(int))
        assert apart.max() <= 1
    files = [
        write_graph(model, tmp_path / f"{number}.onnx", opset=HALF_OPSET).file
        for number, model in enumerate((channels, shared))
    ]
    assert cosine(run(files[0], frames), run(files[1], frames)) > 0.9999


def test_layers_that_read_one_activation_share_a_scale(
    graph: Path, calibration: Calibration
) -> None:
    """TensorRT joins their products into one, which takes one factor."""
    constants = quantized(graph, calibration, FP8).graph.initializers
    for layer in range(3):
        scales = {
            float(
                constants[f"tower.layers.{layer}.attention.{part}.weight.scale"].const_value.numpy()
            )
            for part in ("q_proj", "k_proj", "v_proj")
        }
        assert len(scales) == 1


def test_fp8_ends_at_448_of_the_largest_value(graph: Path, calibration: Calibration) -> None:
    model = quantized(graph, calibration, FP8)
    constants = model.graph.initializers
    stored = [value for name, value in constants.items() if name.endswith(".weight.fp8")]
    assert len(stored) == 18
    for value in stored:
        assert value.dtype is ir.DataType.FLOAT8E4M3FN
        assert np.abs(value.const_value.numpy().astype(np.float32)).max() == 448
    fc1 = "tower.layers.0.mlp.fc1"
    largest = calibration.sites[calibration.layers[fc1].site].largest
    scale = float(constants[f"{fc1}.input_scale"].const_value.numpy())
    assert scale == pytest.approx(largest / 448, rel=2e-3)


def test_both_products_of_attention_are_quantized(
    graph: Path, calibration: Calibration, frames: list[Frame]
) -> None:
    exact = {one.name: one for one in find_attentions(ir.load(graph))}
    assert set(calibration.attentions) == set(exact)
    model = quantized(graph, calibration, FP8)
    for node in model.graph:
        if node.op_type == "MatMul" and node.name in {
            product.name for one in exact.values() for product in (one.scores, one.means)
        }:
            made_by = [value.producer() for value in node.inputs if value is not None]
            assert [one.op_type for one in made_by if one] == ["DequantizeLinear"] * 2
    for name, record in calibration.attentions.items():
        assert record.query > 0 and record.key > 0 and record.value > 0, name


def test_ranges_of_attention_are_what_its_products_read(
    graph: Path, frames: list[Frame], tmp_path: Path
) -> None:
    plain = calibrate(graph, frames, CalibrationOptions(smooth=False, sample_rows=64, threads=1))
    model = ir.load(graph)
    one = find_attentions(model)[1]
    model.graph.outputs[:] = [one.queries, one.keys, one.values]
    for value in model.graph.outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    ir.save(model, tmp_path / "tapped.onnx")
    with OrtSession(tmp_path / "tapped.onnx", threads=1) as session:
        seen = [list(session.run({"pixel_values": frame}).values()) for frame in frames]
    record = plain.attentions[one.name]
    largest = [max(float(np.abs(frame[at]).max()) for frame in seen) for at in range(3)]
    np.testing.assert_allclose([record.query, record.key, record.value], largest, rtol=1e-4)


def test_an_attention_with_a_layer_in_floating_point_stays_there(
    graph: Path, calibration: Calibration
) -> None:
    given_back = calibration.excluding(("tower.layers.1.attention.k_proj",))
    assert apply_calibration(ir.load(graph), given_back, FP8) == len(calibration.attentions) - 1


@pytest.mark.parametrize(
    ("positions", "channels", "small"),
    [(577, 64, True), (3072, 64, True), (3073, 64, False), (577, 72, False), (577, 40, False)],
)
def test_only_what_tensorrt_fuses_is_quantized(positions: int, channels: int, small: bool) -> None:
    kind = ir.TensorType(ir.DataType.FLOAT)
    queries, keys, values, weights = (
        ir.Value(name=name, type=kind, shape=ir.Shape(shape))
        for name, shape in (
            ("q", (1, 2, positions, channels)),
            ("k", (1, 2, channels, positions)),
            ("v", (1, 2, positions, channels)),
            ("w", (1, 2, positions, positions)),
        )
    )
    scores, means = ir.node("MatMul", [queries, keys]), ir.node("MatMul", [weights, values])
    assert Attention("tower.layers.0.attention", scores, means).is_small is small


def test_a_record_with_attentions_comes_back(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "c.json")
    again = load_calibration(tmp_path / "c.json")
    assert again.attentions == calibration.attentions
    assert again.digest() == calibration.digest()


def test_a_record_made_before_attentions_keeps_its_digest() -> None:
    """The digest is in the graphs and the manifests that were made with it."""
    made = load_calibration(Path("models/pocket-llava/calibration.json"))
    assert made.attentions
    before = made.model_copy(update={"attentions": {}})
    content = json.loads(before.model_dump_json())
    kept = {
        name: value
        for name, value in content.items()
        if name not in ("checksum", "agreement", "attentions")
    }
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    assert before.digest() == hashlib.sha256(text.encode()).hexdigest()
