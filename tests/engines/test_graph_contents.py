"""Graphs of strangers: what nothing bounds is refused before an engine sees it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.parser
import pytest

from engines.bundle import Bundle, open_bundle, write_bundle
from engines.errors import BundleError, EngineError
from engines.graph_contents import MICROSOFT_DOMAIN, ONNX_DOMAINS, check_graph_contents
from engines.manifest import Manifest
from engines.opening import open_session
from tests.tiny_bundle import tiny_manifest, tiny_vision_graph

ENDLESS = """
    <ir_version: 9, opset_import: ["" : 18]>
    endless (float[1] x) => (float[1] y)
    <int64 trips = {4611686018427387904}, bool go = {1}> {
        y = Loop (trips, go, x) <body = step (int64 i, bool c, float[1] a) =>
            (bool again, float[1] b) { again = Identity(c) b = Add(a, a) }>
    }
"""


def bundle_of(root: Path, graph: bytes, **files: bytes) -> Bundle:
    """Write a bundle with this vision graph and further files, named by keyword."""
    with write_bundle(root / "bundle") as draft:
        draft.path("vision.onnx").write_bytes(graph)
        for name in ("embeddings.safetensors", "tokenizer.json", "decoder/model.onnx"):
            draft.path(name).write_text(name)
        for name, content in files.items():
            draft.path(name).write_bytes(content)
        draft.describe(Manifest.model_validate(tiny_manifest()))
    return open_bundle(root / "bundle")


def refusal(bundle: Bundle) -> str:
    with pytest.raises(BundleError) as caught:
        open_session(bundle, engine="ort")
    return str(caught.value)


def test_our_own_graph_passes(tmp_path: Path) -> None:
    check_graph_contents(bundle_of(tmp_path, tiny_vision_graph()), "vision.onnx")


def test_a_loop_without_end_is_refused(tmp_path: Path) -> None:
    graph = onnx.parser.parse_model(ENDLESS).SerializeToString()
    assert "holds what export.build never writes: the operator Loop" in refusal(
        bundle_of(tmp_path, graph)
    )


def test_a_branch_inside_of_a_branch_is_found(tmp_path: Path) -> None:
    graph = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18, "own" : 1]>
        branch (float[1] x, bool c) => (float[1] y) {
            y = If (c) <
                then_branch = a () => (float[1] p) { p = own.Strange (x) },
                else_branch = b () => (float[1] q) { q = Identity (x) }>
        }
    """).SerializeToString()
    told = refusal(bundle_of(tmp_path, graph))
    assert "the operator If; the operator own.Strange" in told


def test_functions_are_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(tiny_vision_graph())
    node = onnx.helper.make_node("Add", ["a", "a"], ["b"])
    opset = [onnx.helper.make_opsetid("", 18)]
    model.functions.append(onnx.helper.make_function("own", "Twice", ["a"], ["b"], [node], opset))
    assert "functions of its own" in refusal(bundle_of(tmp_path, model.SerializeToString()))


def test_microsoft_operators_are_for_decoders(tmp_path: Path) -> None:
    model = onnx.load_from_string(tiny_vision_graph())
    for name in ("GroupQueryAttention", "EPContext"):
        node = onnx.helper.make_node(name, ["q"], [name], domain=MICROSOFT_DOMAIN)
        model.graph.node.append(node)
    bundle = bundle_of(tmp_path, model.SerializeToString())
    assert "com.microsoft.GroupQueryAttention" in refusal(bundle)
    with pytest.raises(BundleError) as caught:
        check_graph_contents(bundle, "vision.onnx", (*ONNX_DOMAINS, MICROSOFT_DOMAIN))
    assert "EPContext" in str(caught.value)
    assert "GroupQueryAttention" not in str(caught.value)


@pytest.mark.parametrize(
    ("location", "offset", "told"),
    [
        ("../outside.data", 0, "'../outside.data'"),
        ("/etc/passwd", 0, "'/etc/passwd'"),
        ("weights.data", 64, "ends before 80"),
        ("weights.data", -8, "ends before 8"),
    ],
)
def test_weights_elsewhere_are_refused(
    tmp_path: Path, location: str, offset: int, told: str
) -> None:
    (tmp_path / "outside.data").write_bytes(bytes(64))
    model = onnx.load_from_string(tiny_vision_graph())
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)
    content = {"weights.data": bytes(64)}
    assert told in refusal(bundle_of(tmp_path, model.SerializeToString(), **content))


def test_weights_beside_the_graph_pass(tmp_path: Path) -> None:
    model = onnx.load_from_string(tiny_vision_graph())
    for tensor in model.graph.initializer:
        tensor.ClearField("int64_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.data")
    bundle = bundle_of(tmp_path, model.SerializeToString(), **{"weights.data": bytes(64)})
    check_graph_contents(bundle, "vision.onnx")


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"vision.onnx", b"\x3a\xff\xff\x03abc"])
def test_what_is_no_graph_is_told(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(EngineError, match="is not a graph that ONNX Runtime or another engine"):
        open_session(bundle_of(tmp_path, content), engine="ort")
