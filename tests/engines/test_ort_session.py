"""The ONNX Runtime session: right numbers, checked inputs, no silent fallback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines import ort
from engines.cpu_flags import has_vnni
from engines.errors import EngineError
from engines.ort import CPU, CUDA, OrtSession, create_inference_session
from engines.session import Session


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = x W; where: the indices where x > 0, whose number depends on the data."""
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            helper.make_node("Greater", ["x", "zero"], ["positive"]),
            helper.make_node("NonZero", ["positive"], ["where"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("where", TensorProto.INT64, [2, "found"]),
        ],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.zeros((), np.float32), "zero"),
        ],
    )
    path = tmp_path_factory.mktemp("graph") / "graph.onnx"
    onnx.save(
        helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )
    return path


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_threads_that_wait_do_not_spin(graph: Path) -> None:
    options = create_inference_session(graph).get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_it_runs_at_every_batch_size_and_results_belong_to_the_caller(graph: Path) -> None:
    session: Session
    with OrtSession(graph, threads=1) as session:
        assert session.provider == CPU
        assert (session.input_names, session.output_names) == (("x",), ("y", "where"))
        first = session.run({"x": ones(2, 4)})
        second = session.run({"x": -ones(2, 4)})
        wide = session.run({"x": ones(3, 4)[:, ::-1]})
    np.testing.assert_array_equal(first["y"], [[18, 22, 26]] * 2)
    np.testing.assert_array_equal(second["y"], -first["y"])
    assert first["where"].shape == (2, 8)
    assert second["where"].shape == (2, 0)
    assert wide["y"].shape == (3, 3)


def test_wrong_inputs_are_told_together(graph: Path) -> None:
    with OrtSession(graph) as session:
        with pytest.raises(EngineError) as caught:
            session.run({"x": np.ones((2, 5)), "z": ones(1)})
        assert '"z" is not an input' in str(caught.value)
        assert '"x" is float64[2, 5], expected float32[batch, 4]' in str(caught.value)
        with pytest.raises(EngineError, match='"x" is missing'):
            session.run({})
        with pytest.raises(EngineError, match=r"float32\[4\], expected float32\[batch, 4\]"):
            session.run({"x": ones(4)})


def test_a_closed_session_says_so(graph: Path) -> None:
    session = OrtSession(graph)
    session.close()
    session.close()
    with pytest.raises(EngineError, match="is closed"):
        session.run({"x": ones(1, 4)})


def test_files_that_are_no_graph(tmp_path: Path, graph: Path) -> None:
    with pytest.raises(EngineError, match="does not exist"):
        create_inference_session(tmp_path / "nowhere.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(graph.read_bytes()[:-20])
    with pytest.raises(EngineError, match=r"is not a graph that ONNX Runtime .* can load"):
        create_inference_session(damaged)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_an_absent_provider_is_never_replaced_silently(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    with pytest.raises(EngineError, match="cannot run on NoSuchExecutionProvider, only on"):
        create_inference_session(graph, providers=["NoSuchExecutionProvider"])
    # A provider that is compiled in and cannot start is only warned about by ONNX Runtime.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    with pytest.raises(EngineError, match=r"CUDAExecutionProvider could not start.*cuDNN 9"):
        create_inference_session(graph, providers=[CUDA])


def test_what_stops_a_provider_is_told_and_not_printed(
    graph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    def initialize(self: object, *_: object) -> None:
        raise RuntimeError("Please install TensorRT libraries")

    def preload() -> None:
        print("Failed to load libcublas.so.13: no such file")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", initialize)
    ort._load_gpu_libraries.cache_clear()
    with pytest.raises(EngineError, match=r"start: Please install TensorRT.*libcublas\.so\.13"):
        create_inference_session(graph, providers=[CUDA])
    ort._load_gpu_libraries.cache_clear()
    assert capsys.readouterr().out == "", "stdout belongs to a command's results"


def test_threads_are_checked(graph: Path) -> None:
    with pytest.raises(EngineError, match="threads is 0, expected 1 or more"):
        create_inference_session(graph, threads=0)


def test_the_fast_int8_product_is_taken_only_where_it_is_exact(tmp_path: Path) -> None:
    flags = {"avx2 avx512f": False, "avx2 avx512_vnni": True, "avx_vnni": True, "amx_int8": True}
    for number, (text, expected) in enumerate(flags.items()):
        file = tmp_path / str(number)
        file.write_text(f"flags\t\t: fpu sse {text}\n")
        assert has_vnni(file) is expected
    assert not has_vnni(tmp_path / "none")
