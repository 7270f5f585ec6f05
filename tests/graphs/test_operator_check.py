from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from engines.errors import EngineError, OptionError
from graphs.modules import MODULE_KEY
from graphs.operator_check import TENSORRT_OPS, Refusal, check_graph, find_refusals, infer_types

VERSIONS = ("10.3", "10.13", "10.16", "11.4")


def parse(body: str, opset: int = 18, domains: str = "", x: str = "float[N,4] x") -> ir.Model:
    text = f'<ir_version: 9, opset_import: ["" : {opset}{domains}]> g ({x}) => (float[N,4] y)'
    return infer_types(ir.from_proto(onnx.parser.parse_model(f"{text} {body}")))


def reasons(model: ir.Model, version: str = "10.3") -> list[str]:
    return [refusal.reason for refusal in find_refusals(model, version)]


GOOD = """<int64[1] axes = {1}, int64[1] k = {3}, float[1] one = {1.0}> {
    values, indices = TopK (x, k)
    total = ReduceSum (values, axes)
    shape = Shape (x)
    wide = Expand (total, shape)
    half = Cast <to = 10> (wide)
    full = Cast <to = 1> (half)
    y = Add (full, one)
}"""


@pytest.mark.parametrize("version", VERSIONS)
def test_takes_what_tensorrt_takes(version: str) -> None:
    assert reasons(parse(GOOD), version) == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{ y = Cos (x) }", "not an operator it takes; express it with"),
        (
            "<int64[1,2] i = {0,0}, float[1] u = {1.0}> { y = ScatterND <reduction = "
            '"add"> (x, i, u) }',
            "not an operator it takes; write it as a one-hot matrix times the values",
        ),
        (
            "{ n = NonZero (x) t = Transpose (n) f = Cast <to = 1> (t) y = Identity (x) }",
            "how much it returns depends on the picture",
        ),
        (
            "{ h = Cast <to = 10> (x) y = Add (h, x) }",
            "it mixes FLOAT and FLOAT16, and a strongly typed network takes one type",
        ),
        (
            "<float16[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}> { y = MatMul (x, w) }",
            "it mixes FLOAT and FLOAT16",
        ),
        (
            "{ d = Cast <to = 11> (x) e = Add (d, d) y = Cast <to = 1> (e) }",
            "it casts to DOUBLE",
        ),
        (
            "{ b = Cast <to = 9> (x) y = Softmax (b) }",
            "it reads BOOL, expected one of BFLOAT16, FLOAT, FLOAT16",
        ),
        (
            "<int64[1] z = {0}> { f = ReduceMax <keepdims = 0> (x) i = Cast <to = 7> (f)"
            " u = Unsqueeze (i, z) v, w = TopK (x, u) y = Identity (x) }",
            "input 1, 'u', must be a constant",
        ),
        (
            "<int64[1] k = {3841}> { v, w = TopK (x, k) y = Identity (x) }",
            "K is 3841, 3840 at most; reduce in two steps",
        ),
        (
            "<int64[1] k = {2}> { v, w = TopK <sorted = 0> (x, k) y = Identity (x) }",
            "sorted is 0, expected 1",
        ),
        (
            "<int64[1] flat = {-1}> { i = Cast <to = 7> (x) s = Reshape (i, flat)"
            " y = Reshape (x, s) }",
            "its shape 's' depends on data; make it a constant or use Shape",
        ),
        (
            "<float[4] s = {1,1,1,1}> { n, m = LayerNormalization (x, s) y = Add (n, m) }",
            "its mean and deviation are read",
        ),
        (
            "<float s = {0.1}, int8 z = {3}> { q = QuantizeLinear (x, s, z)"
            " y = DequantizeLinear (q, s, z) }",
            "its zero point is not 0; quantize symmetrically",
        ),
        (
            "<float s = {0.1}, uint8 z = {0}> { q = QuantizeLinear (x, s, z)"
            " y = DequantizeLinear (q, s, z) }",
            "it quantizes to UINT8, expected INT8",
        ),
        (
            "<float s = {0.1}> { q = QuantizeLinear (x, s) y = DequantizeLinear (q, s) }",
            "it has no zero point, which means UINT8",
        ),
        (
            "<float s = {0.0}, int8 z = {0}> { q = QuantizeLinear (x, s, z)"
            " y = DequantizeLinear (q, s, z) }",
            "a scale is not above zero",
        ),
        (
            "<int64[9] shape = {1,1,1,1,1,1,1,-1,4}> { r = Reshape (x, shape) y = Identity (x) }",
            "it makes a tensor of 9 axes, 8 at most",
        ),
    ],
)
def test_refuses_what_tensorrt_refuses(body: str, expected: str) -> None:
    found = reasons(parse(body))
    assert any(expected in reason for reason in found), found


def test_a_type_that_cannot_be_told_is_not_passed_over() -> None:
    model = parse("{ a = elsewhere.Mystery (x) y = Add (a, x) }", domains=', "elsewhere" : 1')
    assert "the type of what it reads, 'a', cannot be told" in reasons(model)


def test_rules_follow_the_version() -> None:
    body = """<int64[1] a = {0}, int64[1] b = {4}> {
        s = Shape (x) axes = Slice (s, a, a2) y = Slice (x, a, b, axes) }"""
    body = body.replace("<int64[1] a", "<int64[1] a2 = {1}, int64[1] a")
    assert "input 3, 'axes', must be a constant" in reasons(parse(body), "10.3")
    assert not any("must be a constant" in r for r in reasons(parse(body), "10.16"))
    late = parse("{ y = Identity (x) }", opset=21)
    assert reasons(late, "10.3") == ["its parser reads up to 20; export with opset 20 or less"]
    assert reasons(late, "11.4") == []


def test_a_fused_graph_is_refused() -> None:
    model = parse("{ y = microsoft.QuickGelu (x) }", domains=', "microsoft" : 1')
    assert reasons(model) == [
        "it is of the domain 'microsoft', which has no parser; export without fusions"
    ]


def test_only_the_batch_may_be_dynamic() -> None:
    model = parse("<int64[2] s = {-1, 4}> { y = Reshape (x, s) }", x="float[N,M,4] x")
    assert find_refusals(model, "10.3") == [
        Refusal("x", "input", "", "axes [0, 1] are dynamic and only the batch, axis 0, may be")
    ]


def test_error_names_the_first_node_and_its_module(tmp_path: Path) -> None:
    model = parse("{ a = Cos (x) b = Sin (a) y = Tan (b) }")
    for number, node in enumerate(model.graph):
        node.name = f"tower.layers.{number}/{node.op_type}"
        node.metadata_props[MODULE_KEY] = f"tower.layers.{number}"
    ir.save(model, tmp_path / "v.onnx")
    with pytest.raises(EngineError) as raised:
        check_graph(tmp_path / "v.onnx", "10.3")
    assert str(raised.value).startswith(
        f"{tmp_path / 'v.onnx'}: TensorRT 10.3 will refuse Cos 'tower.layers.0/Cos' from "
        "tower.layers.0: not an operator it takes"
    )
    assert str(raised.value).endswith("2 more such places follow.")


@pytest.mark.parametrize("version", ["9.3", "ten", "10"])
def test_an_unknown_version_is_told(version: str) -> None:
    with pytest.raises(OptionError, match=r"expected 10\.0 or later"):
        find_refusals(parse(GOOD), version)


def test_operators_are_onnx_operators() -> None:
    assert all(onnx.defs.has(name) for name in TENSORRT_OPS)
