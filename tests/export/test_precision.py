from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.errors import OptionError
from engines.ort import OrtSession
from export.checkpoint.llava import open_checkpoint
from export.reducers import make_reducer
from export.vision.to_onnx import export_onnx
from export.vision.vision_module import build_vision_module
from graphs.float16 import (
    FP32_MODULES,
    PRECISION_KEY,
    convert_to_fp16,
    write_fp16_graph,
)
from graphs.modules import is_inside, module_of
from graphs.operator_check import check_graph
from tests.photographs import clip_pixels

CASES: dict[str, dict[str, Any]] = {
    "visionzip": {"dominant": 14, "contextual": 5},
    "prumerge": {"budget": 40},
    "prumerge_plus": {"budget": 60},
    "none": {},
    "pool": {"budget": 16},
}
FP16, FP32 = TensorProto.FLOAT16, TensorProto.FLOAT


@pytest.fixture(scope="module")
def graphs(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Reducer -> the float32 graph and its float16 twin."""
    folder = tmp_path_factory.mktemp("precision")
    checkpoint = open_checkpoint(tiny_checkpoint)
    pairs = {}
    for name, options in CASES.items():
        graph = build_vision_module(checkpoint, make_reducer(name, **options))
        full, half = folder / f"{name}.onnx", folder / f"{name}-fp16.onnx"
        export_onnx(graph, full)
        write_fp16_graph(full, half)
        pairs[name] = (full, half)
    return pairs


@pytest.fixture(scope="module")
def runs(graphs):
    pixels = clip_pixels(56)

    def run(file: Path):
        with OrtSession(file, threads=1) as session:
            return session.run({"pixel_values": pixels})

    return {name: (run(full), run(half)) for name, (full, half) in graphs.items()}


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """The type of every value, as ONNX itself infers it."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    graph = inferred.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    return types | {w.name: w.data_type for w in graph.initializer}


@pytest.mark.parametrize("name", CASES)
def test_nothing_that_selects_tokens_is_half(graphs, name):
    model = onnx.load(graphs[name][1])
    types = element_types(model)
    found = set()
    for node in ir.load(graphs[name][1]).graph:
        if is_inside(module_of(node), FP32_MODULES):
            used = {types[v.name] for v in (*node.inputs, *node.outputs) if v is not None}
            assert FP16 not in used, node.name
            found.add(module_of(node))
    assert "reducer" in found


@pytest.mark.parametrize("name", CASES)
def test_no_node_mixes_types_and_the_tower_is_half(graphs, name):
    model = onnx.load(graphs[name][1])
    types = element_types(model)
    halves = 0
    for node in model.graph.node:
        floats = {types[v] for v in (*node.input, *node.output) if types.get(v) in (FP16, FP32)}
        if node.op_type == "Cast":
            continue
        assert len(floats) <= 1, node.name
        if node.op_type in ("MatMul", "Conv", "LayerNormalization", "Softmax"):
            inside = is_inside(node.name.rpartition("/")[0], FP32_MODULES)
            assert floats == ({FP32} if inside else {FP16}), node.name
            halves += not inside
    assert halves > 30
    outputs = {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    assert outputs["visual_tokens"] == FP32
    assert model.graph.input[0].type.tensor_type.elem_type == FP32


@pytest.mark.parametrize("name", CASES)
def test_types_change_at_the_border_only(graphs, name):
    model = onnx.load(graphs[name][1])
    types = element_types(model)
    full = {node.name for node in onnx.load(graphs[name][0]).graph.node}
    casts = [node for node in model.graph.node if node.name not in full]
    assert all(node.op_type == "Cast" for node in casts)
    sources = {cast.input[0] for cast in casts}
    assert len(sources) == len(casts), "a value is cast twice"
    assert "pixel_values" in sources
    # One in and one out of the graph, features, class token, merged tokens, and what scores read.
    assert len(casts) <= 8
    for cast in casts:
        assert {types[cast.input[0]], types[cast.output[0]]} == {FP16, FP32}


@pytest.mark.parametrize("version", ["10.3", "10.13", "10.16", "11.4"])
def test_every_tensorrt_will_take_both(graphs, version):
    for pair in graphs.values():
        for file in pair:
            check_graph(file, version)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float32(runs, name):
    full, half = runs[name]
    np.testing.assert_array_equal(full["valid_count"], half["valid_count"])
    kept = shared = 0
    for mine, other in zip(full["patch_index"], half["patch_index"], strict=True):
        kept += int((mine >= 0).sum())
        shared += len(np.intersect1d(mine[mine >= 0], other[other >= 0]))
    assert shared >= 0.99 * kept
    cosines = []
    for number, count in enumerate(full["valid_count"]):
        a, b = (o["visual_tokens"][number, :count] for o in (full, half))
        same = full["patch_index"][number, :count] == half["patch_index"][number, :count]
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines.append(((a * b).sum(axis=1) / norms)[same])
    assert np.concatenate(cosines).mean() >= 0.999


def test_weights_are_stored_once_and_keep_their_names(graphs):
    full, half = (onnx.load(file) for file in graphs["visionzip"])
    before, after = ({w.name: w for w in m.graph.initializer} for m in (full, half))
    name = "tower.layers.0.attention.q_proj.weight"
    assert after[name].data_type == FP16
    np.testing.assert_allclose(
        numpy_helper.to_array(after[name]),
        numpy_helper.to_array(before[name]),
        rtol=1e-3,
        atol=1e-6,
    )
    assert not any("float" in n for n, w in after.items() if len(w.dims) == 2)
    assert graphs["visionzip"][1].stat().st_size < 0.6 * graphs["visionzip"][0].stat().st_size
    assert {p.key: p.value for p in half.metadata_props}[PRECISION_KEY] == "fp16"


def norm_graph() -> onnx.ModelProto:
    width = 64
    node = helper.make_node("LayerNormalization", ["x", "s", "b"], ["y"], name="tower.norm/LN")
    weights = [
        numpy_helper.from_array(np.full(width, value, np.float32), name)
        for name, value in (("s", 1.0), ("b", 0.0))
    ]
    shape = [1, width]
    x, y = (helper.make_tensor_value_info(name, FP32, shape) for name in "xy")
    graph = helper.make_graph([node], "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_layer_norm_survives_activations_whose_square_is_not_a_half(tmp_path):
    model = ir.from_proto(norm_graph())
    convert_to_fp16(model)
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    assert norm.attributes["stash_type"].as_int() == FP32
    ir.save(model, tmp_path / "norm.onnx")
    x = np.linspace(-30000, 30000, 64, dtype=np.float32)[None]
    with OrtSession(tmp_path / "norm.onnx") as session:
        y = session.run({"x": x})["y"]
    np.testing.assert_allclose(y, x / x.std(), atol=2e-3)


def test_a_weight_beyond_half_is_named():
    proto = norm_graph()
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full(64, 1e5, np.float32), "s"))
    with pytest.raises(OptionError, match=r"weight 's' reaches 100000, and float16 ends at 65504"):
        convert_to_fp16(ir.from_proto(proto))


def quantized_graph(opset: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="tower.a/Q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="tower.a/DQ"),
        helper.make_node("MatMul", ["d", "w"], ["y"], name="tower.a/MatMul"),
    ]
    weights = [
        numpy_helper.from_array(np.float32(0.01), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
        numpy_helper.from_array(np.eye(8, dtype=np.float32), "w"),
    ]
    x, y = (helper.make_tensor_value_info(name, FP32, [1, 8]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def test_quantized_graph_needs_opset_19():
    with pytest.raises(OptionError, match=r"the first is 'tower.a/Q'\) and of opset 18"):
        convert_to_fp16(ir.from_proto(onnx.shape_inference.infer_shapes(quantized_graph(18))))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(quantized_graph(19)))
    convert_to_fp16(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    types = element_types(proto)
    matmul = next(node for node in proto.graph.node if node.op_type == "MatMul")
    assert {types[name] for name in matmul.input} == {FP16}


def test_modules_match_whole_names():
    assert is_inside("tower.scores.k_proj", FP32_MODULES)
    assert is_inside("reducer", FP32_MODULES)
    assert not is_inside("reducers.extra", FP32_MODULES)
    assert not is_inside("tower.layers.0", FP32_MODULES)
