"""A graph with its weights beside it: read again, and other weights noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from engines.ort import OrtSession
from graphs.graph_file import write_graph

SIDE = 64


def scaled(weight: np.ndarray, rows: int) -> ir.Model:
    """A graph that multiplies by a weight and keeps the first rows."""
    model = ir.from_proto(
        onnx.parser.parse_model(f"""
        <ir_version: 9, opset_import: ["" : 18]>
        scaled (float[batch, {SIDE}] x) => (float[batch, {rows}] y) <
            int64[1] zero = {{0}}, int64[1] rows = {{{rows}}}, int64[1] axis = {{1}}
        > {{
            product = MatMul (x, weight)
            y = Slice (product, zero, rows, axis)
        }}
    """)
    )
    value = ir.val("weight", ir.DataType.FLOAT, weight.shape, const_value=ir.tensor(weight))
    for node in model.graph:
        for at, taken in enumerate(node.inputs):
            if taken is not None and taken.name == "weight":
                node.replace_input_with(at, value)
    value.const_value.name = "weight"
    model.graph.register_initializer(value)
    return model


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float32)


def run(file: Path) -> np.ndarray:
    with OrtSession(file) as session:
        return session.run({"x": np.eye(SIDE, dtype=np.float32)[:3]})["y"]


def test_a_graph_with_other_weights_is_another_file(weight: np.ndarray, tmp_path: Path) -> None:
    """It points to the same place; whoever hashes the graph alone must notice all the same."""
    texts = []
    for number, values in enumerate((weight, weight, weight + 1)):
        place = tmp_path / str(number) / "v.onnx"
        file = write_graph(scaled(values, 5), place, external_weights=True).file
        texts.append(file.read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_a_graph_read_with_its_weights_apart_is_written_whole(
    weight: np.ndarray, tmp_path: Path
) -> None:
    apart = write_graph(scaled(weight, 5), tmp_path / "apart" / "v.onnx", external_weights=True)
    assert apart.weights_file == tmp_path / "apart" / "v.onnx.data"
    whole = write_graph(ir.load(apart.file), tmp_path / "whole" / "v.onnx")
    assert whole.weights_file is None
    np.testing.assert_array_equal(run(whole.file), run(apart.file))


def test_a_refused_graph_leaves_nothing(weight: np.ndarray, tmp_path: Path) -> None:
    model = scaled(weight, 5)
    model.graph[-1].op_type = "Slyce"
    with pytest.raises(onnx.checker.ValidationError, match="Slyce"):
        write_graph(model, tmp_path / "v.onnx", external_weights=True)
    assert list(tmp_path.iterdir()) == []
