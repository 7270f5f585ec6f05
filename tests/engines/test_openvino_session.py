"""OpenVINO gives what ONNX Runtime gives, in FP32 when FP32 was asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

pytest.importorskip("openvino", reason="pip install 'foveate[openvino]'")

from engines import openvino_session
from engines.errors import EngineError
from engines.openvino_session import OpenVinoSession, cpu_has_bf16
from engines.ort import OrtSession
from tests.small_graph import SIDE, make_small_graph

RANDOM = np.random.default_rng(5)


def make_pixels(batch: int) -> dict[str, np.ndarray]:
    return {"pixel_values": RANDOM.standard_normal((batch, 3, SIDE, SIDE)).astype(np.float32)}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "vision.onnx"
    path.write_bytes(make_small_graph().SerializeToString())
    return path


@pytest.fixture(scope="module")
def session(graph: Path) -> OpenVinoSession:
    return OpenVinoSession(graph)


@pytest.mark.parametrize("batch", [1, 3, 1])
def test_it_gives_what_onnx_runtime_gives(
    graph: Path, session: OpenVinoSession, batch: int
) -> None:
    inputs = make_pixels(batch)
    with OrtSession(graph) as reference:
        expected = reference.run(inputs)
    found = session.run(inputs)
    assert session.output_names == tuple(expected)
    np.testing.assert_array_equal(found["patch_index"], expected["patch_index"])
    np.testing.assert_allclose(found["visual_tokens"], expected["visual_tokens"], atol=1e-5)


def test_fp32_is_not_rounded_to_bf16(graph: Path, session: OpenVinoSession) -> None:
    if not cpu_has_bf16():
        pytest.skip("this CPU has no BF16, so OpenVINO could not round to it")
    inputs = make_pixels(4)
    with OrtSession(graph) as reference:
        expected = reference.run(inputs)["visual_tokens"]
    assert np.abs(session.run(inputs)["visual_tokens"] - expected).max() < 1e-5
    assert session.provider.endswith("(fp32)")


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small graph with the exporter's node names."""
    model = make_small_graph()
    for node in model.graph.node:
        chooses = node.op_type in ("Softmax", "ReduceMax", "TopK", "GatherElements")
        module = "reducer" if chooses else "tower.layers.0"
        node.name = f"{module}/{node.op_type}_{node.output[0]}"
    path = tmp_path_factory.mktemp("named") / "vision.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def runtime_precisions(stage) -> dict[str, str]:
    return {
        node.get_friendly_name(): node.get_rt_info()["runtimePrecision"].astype(str)
        for node in stage.get_runtime_model().get_ops()
        if "runtimePrecision" in node.get_rt_info()
    }


def test_a_bf16_tower_leaves_the_choice_in_fp32(named: Path) -> None:
    if not cpu_has_bf16():
        pytest.skip("this CPU has no BF16")
    inputs = make_pixels(4)
    with OrtSession(named) as reference:
        expected = reference.run(inputs)
    with OpenVinoSession(named, rest="bf16") as rounded:
        assert rounded.provider.endswith("(bf16)")
        assert rounded.input_names == ("pixel_values",)
        tower, selection = (runtime_precisions(stage) for stage in rounded._stages)
        found = rounded.run(inputs)
    assert "bf16" in tower.values()
    assert "bf16" not in selection.values()
    assert any("patch_index" in name for name in selection)
    assert not any("patch_index" in name for name in tower)
    np.testing.assert_allclose(found["visual_tokens"], expected["visual_tokens"], atol=0.1)


def test_bf16_needs_the_exporters_names(graph: Path) -> None:
    if not cpu_has_bf16():
        pytest.skip("this CPU has no BF16")
    with pytest.raises(EngineError, match=r"does not name the modules.*reducer, tower\.scores"):
        OpenVinoSession(graph, rest="bf16")


def test_a_cpu_without_bf16_is_told(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_session, "_has_bf16", lambda core: False)
    with pytest.raises(EngineError, match="neither AMX nor AVX-512 BF16"):
        OpenVinoSession(graph, rest="bf16")


def test_outputs_keep_the_graphs_names(tmp_path: Path) -> None:
    model = make_small_graph()
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "visual_tokens":
                node.output[index] = "an_inner_name"
    copied = helper.make_node("Identity", ["an_inner_name"], ["visual_tokens"])
    model.graph.node.append(copied)
    path = tmp_path / "vision.onnx"
    path.write_bytes(model.SerializeToString())
    with OpenVinoSession(path) as session:
        assert session.output_names == ("visual_tokens", "patch_index")
        assert set(session.run(make_pixels(1))) == {"visual_tokens", "patch_index"}


def test_results_belong_to_the_caller(session: OpenVinoSession) -> None:
    first = session.run(make_pixels(1))["visual_tokens"]
    kept = first.copy()
    session.run(make_pixels(1))
    np.testing.assert_array_equal(first, kept)


def test_the_compiled_graph_is_kept(graph: Path, tmp_path: Path) -> None:
    with OpenVinoSession(graph, cache=tmp_path / "cache", threads=1) as first:
        expected = first.run({"pixel_values": np.ones((1, 3, SIDE, SIDE), np.float32)})
    assert list((tmp_path / "cache").glob("*.blob"))
    with OpenVinoSession(graph, cache=tmp_path / "cache", threads=1) as second:
        found = second.run({"pixel_values": np.ones((1, 3, SIDE, SIDE), np.float32)})
    np.testing.assert_array_equal(found["visual_tokens"], expected["visual_tokens"])


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, '"pixel_values" is missing'),
        ({"pixels": np.zeros(1)}, '"pixels" is not an input'),
        ({"pixel_values": np.zeros((1, 3, 4, 4), np.float32)}, r"expected float32\[any, 3, 8, 8\]"),
        ({"pixel_values": np.zeros((1, 3, 8, 8), np.float64)}, "is float64"),
    ],
)
def test_wrong_inputs_are_named(
    session: OpenVinoSession, inputs: dict[str, np.ndarray], expected: str
) -> None:
    with pytest.raises(EngineError, match=expected):
        session.run(inputs)


def test_a_closed_session_says_so(graph: Path) -> None:
    session = OpenVinoSession(graph)
    session.close()
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.run(make_pixels(1))


def test_a_damaged_graph_says_so(tmp_path: Path) -> None:
    path = tmp_path / "vision.onnx"
    with pytest.raises(EngineError, match="does not exist"):
        OpenVinoSession(path)
    path.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"\(11 bytes\) is not a graph that OpenVINO"):
        OpenVinoSession(path)


def test_missing_openvino_says_what_to_install(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"pip install 'foveate\[openvino\]'"):
        OpenVinoSession(graph)
