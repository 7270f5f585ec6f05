"""Where Q/DQ are, what they hold, and what a calibration refuses."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import random_graphs
from calibration.scales.apply import apply_calibration
from calibration.scales.calibrate import CalibrationOptions, calibrate
from calibration.scales.calibration_file import Calibration, load_calibration
from calibration.scales.insert_qdq import half_exact, smooth_site
from calibration.scales.layers import find_layers, find_sites
from engines.errors import CalibrationError
from engines.ort import OrtSession
from graphs.float16 import convert_to_fp16
from graphs.graph_file import write_graph
from graphs.modules import module_of
from graphs.operator_check import check_graph
from tests.photographs import clip_pixels

REDUCERS = ("visionzip", "prumerge_plus", "none")
OPTIONS = CalibrationOptions(alphas=(0.5,), sample_rows=64, threads=1)
PARTS = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj")
PLANNED = {f"tower.layers.{n}.{part}" for n in range(3) for part in (*PARTS, "mlp.fc1", "mlp.fc2")}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: random_graphs.write_graph(tmp_path_factory.mktemp(name), name)[0] for name in REDUCERS
    }


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return [pixels[None].astype(np.float32) for pixels in clip_pixels(56)]


@pytest.fixture(scope="module")
def calibration(graphs, frames) -> Calibration:
    return calibrate(graphs["visionzip"], frames[:8], OPTIONS)


def quantized(file: Path, calibration: Calibration) -> ir.Model:
    model = ir.load(file)
    apply_calibration(model, calibration)
    return model


def run(file: Path, frames) -> list[dict[str, np.ndarray]]:
    with OrtSession(file, threads=1) as session:
        return [session.run({"pixel_values": frame}) for frame in frames]


@pytest.mark.parametrize("reducer", REDUCERS)
def test_one_calibration_quantizes_exactly_the_planned_layers_of_any_graph(
    graphs, calibration, reducer
) -> None:
    model = quantized(graphs[reducer], calibration)
    reads_int8 = set()
    for node in model.graph:
        made_by = [value.producer() for value in node.inputs if value is not None]
        from_int8 = [p is not None and p.op_type == "DequantizeLinear" for p in made_by]
        if any(from_int8) and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            assert node.op_type in ("MatMul", "Gemm")
            assert from_int8[:2] == [True, True], node.name
            reads_int8.add(module_of(node))
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert module_of(node) in PLANNED
    assert reads_int8 == PLANNED


def test_scales_are_per_channel_for_weights_and_zero_points_are_zero(graphs, calibration) -> None:
    model = quantized(graphs["visionzip"], calibration)
    kinds = Counter()
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = (node.inputs[index].const_value.numpy() for index in (1, 2))
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (scale > 0).all()
        assert (half_exact(scale) == scale).all()
        source = node.inputs[0]
        if source.is_initializer():
            axis = node.attributes["axis"].as_int()
            assert scale.shape == zero.shape == (source.shape[axis],)
            assert np.abs(source.const_value.numpy()).max() <= 127
            kinds["weight"] += 1
        else:
            assert scale.shape == zero.shape == ()
            kinds[node.op_type] += 1
    # A pair for each product, six a layer; the patch convolution has none.
    assert kinds == {"weight": 18, "QuantizeLinear": 18, "DequantizeLinear": 18}
    assert not any(name.endswith("q_proj.weight") for name in model.graph.initializers)


@pytest.mark.parametrize("reducer", REDUCERS)
def test_smoothing_alone_changes_nothing_in_floating_point(
    graphs, calibration, frames, tmp_path, reducer
) -> None:
    model = ir.load(graphs[reducer])
    smoothed = 0
    for site in find_sites(model):
        found = calibration.sites[site.name].smoothing
        if found is not None:
            smooth_site(model.graph, site, found.shift, found.scale)
            smoothed += 1
    assert smoothed >= 6
    write_graph(model, tmp_path / "smooth.onnx")
    pairs = zip(run(graphs[reducer], frames), run(tmp_path / "smooth.onnx", frames), strict=True)
    same = 0
    for before, after in pairs:
        if (before["patch_index"] != after["patch_index"]).any():
            continue  # untrained scores tie; what is kept is then another
        tokens = before["visual_tokens"]
        assert np.abs(tokens - after["visual_tokens"]).max() <= 1e-5 * np.abs(tokens).max()
        same += 1
    assert same >= 6


def test_a_norm_that_something_else_reads_is_left_to_it(graphs, calibration) -> None:
    model = ir.load(graphs["none"])
    site = next(site for site in find_sites(model) if site.name == "tower.layers.1.norm1")
    other = ir.node("Identity", [site.source])
    model.graph.insert_after(site.norm, other)
    gamma = site.norm.inputs[1]
    smooth_site(model.graph, site, np.ones(64, np.float32), np.full(64, 2.0, np.float32))
    assert other.inputs[0].producer().inputs[1] is gamma
    twin = site.layers[0].source.producer()
    assert module_of(twin) == "tower.layers.1.norm1"
    np.testing.assert_allclose(
        twin.inputs[1].const_value.numpy() * 2, gamma.const_value.numpy(), rtol=1e-6
    )


def test_out_projection_is_smoothed_in_the_values(graphs) -> None:
    for site in find_sites(ir.load(graphs["visionzip"])):
        if site.name.endswith("out_proj"):
            assert site.values.name == site.name.replace("out_proj", "v_proj")
        assert site.foldable == ("mlp.fc2" not in site.name and "embedding" not in site.name)


@pytest.mark.parametrize("reducer", REDUCERS)
def test_every_tensorrt_takes_it_in_int8_and_float16(
    graphs, calibration, tmp_path, reducer
) -> None:
    model = quantized(graphs[reducer], calibration)
    write_graph(model, tmp_path / "int8.onnx")
    check_graph(tmp_path / "int8.onnx", "10.3")
    model.opset_imports[""] = 19
    convert_to_fp16(model)
    write_graph(model, tmp_path / "mixed.onnx", opset=19)
    for version in ("10.3", "11.4"):
        check_graph(tmp_path / "mixed.onnx", version)


def test_float16_keeps_the_integers(graphs, calibration) -> None:
    full, half = (quantized(graphs["visionzip"], calibration) for _ in range(2))
    half.opset_imports[""] = 19
    convert_to_fp16(half)
    for name, value in full.graph.initializers.items():
        other = half.graph.initializers.get(name)
        if name.endswith((".int8", "scale")):
            np.testing.assert_array_equal(other.const_value.numpy(), value.const_value.numpy())


def test_excluded_layers_stay_as_they_are(graphs, calibration) -> None:
    everything = tuple(calibration.layers)
    kept = "tower.layers.1.mlp.fc2"
    model = quantized(
        graphs["visionzip"], calibration.excluding(tuple(n for n in everything if n != kept))
    )
    touched = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert [module_of(node) for node in touched] == [kept]
    assert {layer.name for layer in find_layers(model)} == PLANNED - {kept}
    untouched = quantized(graphs["visionzip"], calibration.excluding(everything))
    before = ir.load(graphs["visionzip"])
    assert set(untouched.graph.initializers) == set(before.graph.initializers)


def test_only_the_excluded_one_of_three_that_share_an_activation_reads_floats(
    graphs, calibration
) -> None:
    query = "tower.layers.1.attention.q_proj"
    model = quantized(graphs["visionzip"], calibration.excluding((query,)))
    for node in model.graph:
        if node.op_type == "MatMul" and module_of(node).startswith("tower.layers.1.attention.q"):
            assert node.inputs[0].producer().op_type == "LayerNormalization"
            assert node.inputs[1].is_initializer()
        elif module_of(node) == "tower.layers.1.attention.k_proj" and node.op_type == "MatMul":
            assert node.inputs[0].producer().op_type == "DequantizeLinear"


@pytest.mark.parametrize("method", ["max", "mse"])
def test_each_method_keeps_tokens_close(graphs, frames, tmp_path, method) -> None:
    options = replace(OPTIONS, method=method)
    calibration = calibrate(graphs["none"], frames[:6], options)
    write_graph(quantized(graphs["none"], calibration), tmp_path / "int8.onnx")
    pairs = zip(
        run(graphs["none"], frames[:6]), run(tmp_path / "int8.onnx", frames[:6]), strict=True
    )
    for before, after in pairs:
        a, b = before["visual_tokens"][0], after["visual_tokens"][0]
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosine.mean() > 0.995
    thresholds = {site.threshold <= site.largest for site in calibration.sites.values()}
    assert thresholds == {True}


def test_another_checkpoint_is_refused(graphs, calibration) -> None:
    model = ir.load(graphs["visionzip"])
    weight = find_layers(model)[2].weight
    weight.const_value = ir.tensor(weight.const_value.numpy() * 1.001)
    with pytest.raises(
        CalibrationError, match=r"other weights: 1 of 18 layers differ, the first is .*v_proj"
    ):
        apply_calibration(model, calibration)


def test_a_graph_with_more_layers_is_refused(graphs, calibration) -> None:
    fewer = dict(list(calibration.layers.items())[:-2])
    with pytest.raises(CalibrationError, match="2 layers that were not calibrated, the first is"):
        quantized(graphs["visionzip"], calibration.model_copy(update={"layers": fewer}))


def test_a_graph_that_is_quantized_or_half_is_refused(graphs, calibration) -> None:
    model = quantized(graphs["visionzip"], calibration)
    with pytest.raises(CalibrationError, match="quantized already cannot be calibrated"):
        apply_calibration(model, calibration)


def test_nan_in_a_weight_names_the_layer(graphs, frames, tmp_path) -> None:
    model = ir.load(graphs["visionzip"])
    weight = next(x for x in find_layers(model) if x.name == "tower.layers.1.mlp.fc1").weight
    damaged = weight.const_value.numpy().copy()
    damaged[3, 4] = np.nan
    weight.const_value = ir.tensor(damaged, name=weight.name)
    ir.save(model, tmp_path / "nan.onnx")
    with pytest.raises(CalibrationError, match=r"weight of tower\.layers\.1\.mlp\.fc1 holds"):
        calibrate(tmp_path / "nan.onnx", frames, OPTIONS)


def test_an_activation_that_overflows_names_the_layer_and_the_frame(
    graphs, frames, tmp_path
) -> None:
    model = ir.load(graphs["visionzip"])
    norm = next(s for s in find_sites(model) if s.name == "tower.layers.1.norm2").norm
    gamma = norm.inputs[1]
    twin = ir.Value(name="huge", type=gamma.type, shape=gamma.shape)
    twin.const_value = ir.tensor(np.full(64, np.inf, np.float32), name="huge")
    model.graph.register_initializer(twin)
    norm.replace_input_with(1, twin)
    ir.save(model, tmp_path / "inf.onnx")
    with pytest.raises(CalibrationError, match=r"enter tower\.layers\.1\.mlp\.fc1 .* at frame 1"):
        calibrate(tmp_path / "inf.onnx", frames, OPTIONS)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((1, 3, 56, 56)), r"frame 2 is float64\[1, 3, 56, 56\], expected float32"),
        (np.zeros((3, 56, 56), np.float32), r"frame 2 is float32\[3, 56, 56\]"),
        (np.full((1, 3, 56, 56), np.nan, np.float32), "frame 2 holds values that are not finite"),
    ],
)
def test_a_wrong_frame_is_named(graphs, frames, frame, message) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrate(graphs["none"], [frames[0], frame], OPTIONS)


def test_no_frames(graphs) -> None:
    with pytest.raises(CalibrationError, match="no frames"):
        calibrate(graphs["none"], [], OPTIONS)


def test_a_record_survives_its_file(calibration, tmp_path) -> None:
    chosen = calibration.excluding(("tower.layers.0.mlp.fc2",))
    chosen.save(tmp_path / "c.json")
    back = load_calibration(tmp_path / "c.json")
    assert back.digest() == chosen.digest() != calibration.digest()
    assert back.excluded == ("tower.layers.0.mlp.fc2",)
    for name, site in chosen.sites.items():
        np.testing.assert_array_equal(back.sites[name].mean, site.mean)


def test_excluding_an_unknown_layer(calibration) -> None:
    with pytest.raises(CalibrationError, match=r"layer[.]0 is not among the 18 layers"):
        calibration.excluding(("tower.layer.0",))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON .*cut short or damaged"),
        (lambda text: text.replace('"threshold": ', '"threshold": 1', 1), "was changed after"),
        (lambda text: '{"layers": {}}', "not a calibration: it has no checksum"),
        (lambda text: "[1]", "not a calibration"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "version 2"),
    ],
)
def test_a_damaged_file_is_refused(calibration, tmp_path, damage, message) -> None:
    file = tmp_path / "c.json"
    calibration.save(file)
    file.write_text(damage(file.read_text()))
    with pytest.raises(CalibrationError, match=message):
        load_calibration(file)


def test_a_missing_file_and_a_wrong_field(calibration, tmp_path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_calibration(tmp_path / "none.json")
    wrong = calibration.model_copy(update={"method": "guess"})
    wrong.save(tmp_path / "c.json")
    with pytest.raises(CalibrationError, match="does not describe a calibration: method: "):
        load_calibration(tmp_path / "c.json")


class Stops:
    """Frames that are interrupted once, as by Ctrl-C."""

    def __init__(self, frames, at: int) -> None:
        self.frames, self.left = frames, at

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self):
        for frame in self.frames:
            if self.left == 0:
                self.left = -1
                raise KeyboardInterrupt
            self.left -= self.left > 0
            yield frame


@pytest.fixture(scope="module")
def whole(graphs, frames) -> Calibration:
    return calibrate(graphs["none"], frames[:4], OPTIONS)


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_calibration_ends_with_the_same_bits(
    graphs, frames, whole, tmp_path, stop
) -> None:
    some, state = frames[:4], tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        calibrate(graphs["none"], Stops(some, stop), OPTIONS, resume=state)
    assert [file.name for file in tmp_path.iterdir()] == [state.name]
    seen: list[str] = []
    resumed = calibrate(
        graphs["none"],
        some,
        OPTIONS,
        resume=state,
        progress=lambda line, done: seen.append(line),
    )
    assert sum("frame" in line for line in seen) == 4 - stop
    assert resumed.digest() == whole.digest()
    seen.clear()
    again = calibrate(
        graphs["none"],
        some,
        OPTIONS,
        resume=state,
        progress=lambda line, done: seen.append(line),
    )
    assert not any("frame" in line for line in seen)
    assert again.digest() == whole.digest()


def test_a_state_of_something_else_is_refused(graphs, frames, tmp_path) -> None:
    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        calibrate(graphs["none"], Stops(frames[:3], 2), OPTIONS, resume=state)
    with pytest.raises(CalibrationError, match="another checkpoint, other options or"):
        calibrate(graphs["none"], frames[:3], replace(OPTIONS, method="max"), resume=state)
    with pytest.raises(CalibrationError, match="or another number of frames"):
        calibrate(graphs["none"], frames[:1], OPTIONS, resume=state)
    with pytest.raises(CalibrationError, match="made from other frames"):
        calibrate(graphs["none"], frames[3:6], OPTIONS, resume=state)
    state.write_bytes(json.dumps({}).encode())
    with pytest.raises(CalibrationError, match="not the state of an interrupted calibration"):
        calibrate(graphs["none"], frames[:3], OPTIONS, resume=state)
