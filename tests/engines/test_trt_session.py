"""The TensorRT session's data path over stand-ins; TensorRT itself runs in the `gpu` tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.bundle import open_bundle
from engines.errors import EngineError
from engines.gpu import NoGpu, driver_version, find_gpu
from engines.targets import find_target
from engines.trt import cuda_memory
from engines.trt.cuda_memory import CudaRuntime, open_cuda_runtime
from engines.trt.library import TrtLibrary, load_library
from engines.trt.logger import process_logger
from engines.trt.opening import open_trt_session
from engines.trt.plan import PlanRecord, plan_path, write_plan
from engines.trt.session import TrtSession
from tests.fake_tensorrt import (
    TENSORS,
    DataType,
    FakeCuda,
    FakeTensor,
    TensorIOMode,
    make_fake_trt,
    run_model,
)
from tests.small_graph import write_small_bundle

RANDOM = np.random.default_rng(3)


def make_session(cuda: FakeCuda, **options: bool) -> TrtSession:
    library = TrtLibrary("tensorrt", make_fake_trt(cuda), "10.3.0.26")
    return TrtSession(b"plan", library, cuda, **options)


def pixels(batch: int) -> dict[str, np.ndarray]:
    return {"pixel_values": RANDOM.standard_normal((batch, 4)).astype(np.float32)}


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_every_batch_in_any_order_gives_its_own_result(cuda_graphs: bool) -> None:
    cuda = FakeCuda()
    with make_session(cuda, cuda_graphs=cuda_graphs) as session:
        assert session.provider == "tensorrt 10.3.0.26"
        assert session.input_names == ("pixel_values",)
        assert session.output_names == ("visual_tokens", "patch_index")
        for batch in (1, 1, 1, 8, 1, 3, 8, 8, 1):
            inputs = pixels(batch)
            results = session.run(inputs)
            for name, expected in run_model(inputs["pixel_values"]).items():
                np.testing.assert_array_equal(results[name], expected)
                assert results[name].dtype == expected.dtype


def test_a_shape_is_captured_once_and_launched_from_then_on() -> None:
    cuda = FakeCuda()
    with make_session(cuda) as session:
        assert cuda.calls == ["execute", "capture", "execute", "launch"], "when it is opened"
        for _ in range(3):
            session.run(pixels(1))
        assert cuda.calls[4:] == ["launch"] * 3
        session.run(pixels(2))
        assert cuda.calls[-1] == "execute" and not cuda.graphs, "the old shape's graph is void"


def test_a_shape_is_captured_only_right_after_a_run_of_it() -> None:
    cuda = FakeCuda()
    with make_session(cuda) as session:
        opened = len(cuda.calls)
        for batch in (2, 8, 1, 8, 8):
            session.run(pixels(batch))
        assert cuda.calls[opened : opened + 4] == ["execute"] * 4
        assert cuda.calls[opened + 4 :] == ["capture", "execute", "launch"]


def test_more_rows_than_the_plan_takes_are_run_in_parts() -> None:
    for batches in ((1, 1, 1), (4, 4, 4), (1, 2, 3)):
        cuda = FakeCuda()
        library = TrtLibrary("tensorrt", make_fake_trt(cuda, batches=batches), "10.3.0.26")
        with TrtSession(b"plan", library, cuda) as session:
            for rows in (1, 3, 4, 5, 9):
                inputs = pixels(rows)
                results = session.run(inputs)
                for name, expected in run_model(inputs["pixel_values"]).items():
                    np.testing.assert_array_equal(results[name], expected)


def test_a_plan_of_one_size_is_captured_once_for_all() -> None:
    cuda = FakeCuda()
    library = TrtLibrary("tensorrt", make_fake_trt(cuda, batches=(4, 4, 4)), "10.3.0.26")
    with TrtSession(b"plan", library, cuda) as session:
        opened = len(cuda.calls)
        for rows in (4, 3, 1, 4):
            session.run(pixels(rows))
        assert cuda.calls[opened:] == ["launch"] * 4


def test_a_plan_that_cannot_be_captured_runs_without_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cuda = FakeCuda(cannot_capture=True)
    with make_session(cuda) as session:
        for _ in range(4):
            inputs = pixels(1)
            results = session.run(inputs)
            expected = run_model(inputs["pixel_values"])["visual_tokens"]
            np.testing.assert_array_equal(results["visual_tokens"], expected)
    assert cuda.calls.count("capture") == 1 and "launch" not in cuda.calls
    assert caplog.text.count("No CUDA graph of this plan") == 1
    assert "capture invalidated" in caplog.text


def test_tensorrt_rtx_records_its_graphs_itself() -> None:
    cuda = FakeCuda()
    library = TrtLibrary("tensorrt-rtx", make_fake_trt(cuda), "1.7.1.116")
    with TrtSession(b"plan", library, cuda) as session:
        for _ in range(3):
            session.run(pixels(1))
        assert session._engine.settings.cuda_graph_strategy == "WHOLE_GRAPH_CAPTURE"
    assert cuda.calls == ["execute"] * 4, "once when it is opened"
    with TrtSession(b"plan", library, cuda, cuda_graphs=False) as session:
        assert session._engine.settings is None


def test_tensorrt_rtx_keeps_its_kernels_and_takes_only_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "vision.kernels"

    def kernels_kept() -> bool:
        cuda = FakeCuda()
        library = TrtLibrary("tensorrt-rtx", make_fake_trt(cuda), "1.7.1.116")
        with TrtSession(b"plan", library, cuda, kernel_cache=file) as session:
            session.run(pixels(1))
        return "compiled anew" not in caplog.text

    assert kernels_kept() and file.read_bytes().endswith(b"kernels")
    written = file.stat().st_mtime_ns
    assert kernels_kept() and file.stat().st_mtime_ns == written, "nothing to write"
    file.write_bytes(b"0" * 32 + b"kernels")
    assert not kernels_kept(), "somebody else's"
    caplog.clear()
    assert kernels_kept(), "its own again"


def test_the_library_keeps_one_logger() -> None:
    trt = make_fake_trt(FakeCuda())
    assert process_logger(trt) is process_logger(trt)


@pytest.mark.trt
@pytest.mark.usefixtures("compiler")
def test_tensorrt_rtx_has_the_names_that_make_it_do_so() -> None:
    trt = load_library("tensorrt-rtx").trt
    makes = trt.ICudaEngine.create_execution_context.__doc__
    assert "runtime_config: tensorrt_rtx_bindings.tensorrt_rtx.IRuntimeConfig" in makes
    assert hasattr(trt.ICudaEngine, "create_runtime_config")
    assert hasattr(trt.IRuntimeConfig, "cuda_graph_strategy")
    assert hasattr(trt.IRuntimeConfig, "create_runtime_cache")
    assert hasattr(trt.IRuntimeConfig, "set_runtime_cache")
    assert hasattr(trt.IRuntimeConfig, "get_runtime_cache")
    assert hasattr(trt.IRuntimeCache, "serialize") and hasattr(trt.IRuntimeCache, "deserialize")
    assert trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


@pytest.mark.trt
@pytest.mark.usefixtures("compiler")
def test_what_tensorrt_says_is_kept_and_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    trt = load_library("tensorrt-rtx").trt
    logger = process_logger(trt)
    assert trt.Runtime(logger).deserialize_cuda_engine(b"no plan at all" * 40) is None
    assert "incompatible serialization version" in logger.take()
    assert logger.take() == "it does not say why"
    assert capfd.readouterr().out == "", "stdout belongs to a command's results"


def test_too_little_memory_for_a_context_is_said() -> None:
    cuda = FakeCuda()
    library = TrtLibrary("tensorrt", make_fake_trt(cuda, full=True), "10.3.0.26")
    with pytest.raises(EngineError, match=r"cannot make room.*does not say why.*--batch 1"):
        TrtSession(b"plan", library, cuda)


def test_results_belong_to_the_caller() -> None:
    with make_session(FakeCuda()) as session:
        first = session.run(pixels(1))["visual_tokens"]
        kept = first.copy()
        session.run(pixels(1))
        np.testing.assert_array_equal(first, kept)


def test_a_view_that_is_not_contiguous_is_read_rightly() -> None:
    with make_session(FakeCuda()) as session:
        wide = RANDOM.standard_normal((2, 8)).astype(np.float32)[:, ::2]
        results = session.run({"pixel_values": wide})
        np.testing.assert_array_equal(
            results["visual_tokens"], run_model(np.ascontiguousarray(wide))["visual_tokens"]
        )


def test_closing_frees_everything_once() -> None:
    cuda = FakeCuda()
    session = make_session(cuda)
    for _ in range(3):
        session.run(pixels(1))
    session.close()
    session.close()
    assert not cuda.memory and not cuda.pinned and not cuda.graphs and cuda.streams == 0
    with pytest.raises(EngineError, match="closed"):
        session.run(pixels(1))


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, '"pixel_values" is missing'),
        ({"pixels": np.zeros((1, 4), np.float32)}, '"pixels" is not an input'),
        ({"pixel_values": np.zeros((0, 4), np.float32)}, r"float32\[0, 4\], expected float32"),
        ({"pixel_values": np.zeros((1, 5), np.float32)}, r"expected float32\[rows, 4\]"),
        ({"pixel_values": np.zeros((1, 4), np.float64)}, "is float64"),
        ({"pixel_values": np.zeros(4, np.float32)}, r"float32\[4\]"),
    ],
)
def test_wrong_inputs_are_named(inputs: dict[str, np.ndarray], expected: str) -> None:
    with make_session(FakeCuda()) as session, pytest.raises(EngineError, match=expected):
        session.run(inputs)


def test_a_failed_capture_leaves_a_usable_session() -> None:
    cuda = FakeCuda()
    with make_session(cuda) as session:
        session.run(pixels(2))
        session._context.fails = True
        with pytest.raises(EngineError, match="could not run the plan"):
            session.run(pixels(2))
        session._context.fails = False
        inputs = pixels(1)
        result = session.run(inputs)["visual_tokens"]
        np.testing.assert_array_equal(result, run_model(inputs["pixel_values"])["visual_tokens"])


def test_a_refused_plan_says_so() -> None:
    cuda = FakeCuda()
    library = TrtLibrary("tensorrt", make_fake_trt(cuda, refuses=True), "10.3.0.26")
    with pytest.raises(EngineError, match=r"\(4 bytes\): magicTag failed\. Build.*--rebuild"):
        TrtSession(b"plan", library, cuda)


def test_a_type_numpy_lacks_is_named() -> None:
    cuda = FakeCuda()
    odd = FakeTensor("scores", TensorIOMode.OUTPUT, DataType.FP8, (-1, 2))
    library = TrtLibrary("tensorrt", make_fake_trt(cuda, (*TENSORS, odd)), "10.3.0.26")
    with pytest.raises(EngineError, match='"scores" is FP8'):
        TrtSession(b"plan", library, cuda)
    assert not cuda.memory and not cuda.pinned and cuda.streams == 0, "nothing is left behind"


def test_a_plan_cannot_run_where_there_is_no_gpu(tmp_path: Path) -> None:
    if not isinstance(find_gpu(), NoGpu):
        pytest.skip("this machine has a GPU")
    bundle = open_bundle(write_small_bundle(tmp_path / "bundle", target="rtx-4090"))
    target = find_target("rtx-4090")
    graph = bundle.vision()
    plan = plan_path(bundle, graph, target)
    plan.parent.mkdir()
    record = PlanRecord(
        onnx_file="vision.onnx",
        onnx_sha256=bundle.manifest.files["vision.onnx"].sha256,
        library="tensorrt-rtx",
        library_version="1.7.1.116",
        target="rtx-4090",
        precision="fp32",
        sm=89,
        gpu=None,
        driver=None,
        profile={},
        flags=(),
        workspace_bytes=1,
        build_seconds=1,
        built_at="",
        foveate="",
    )
    write_plan(plan, b"plan", record)
    with pytest.raises(EngineError, match=r"sm_89 \(GeForce RTX 4090\) and cannot run here: no NV"):
        open_trt_session(bundle, graph, target)
    plan.unlink()
    with pytest.raises(EngineError, match="there is no such plan"):
        open_trt_session(bundle, graph, target)


def test_driver_version_is_read_or_unknown(tmp_path: Path) -> None:
    proc = tmp_path / "version"
    assert driver_version(proc) == "unknown"
    proc.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.133.20  Sun Mar 30\n")
    assert driver_version(proc) == "570.133.20"
    proc.write_text("nothing of the kind")
    assert driver_version(proc) == "unknown"


def load_fake_runtime(name: str) -> SimpleNamespace:
    """Load a libcudart on a driver that serves CUDA 12.6."""
    if not name.startswith("libcudart.so.1"):
        raise OSError(name)

    def answer(version: int) -> Callable[[Any], None]:
        return lambda to: setattr(to._obj, "value", version)

    return SimpleNamespace(
        cudaRuntimeGetVersion=answer(13_000 if name.endswith("13") else 12_060),
        cudaDriverGetVersion=answer(12_060),
        cudaGetErrorString=SimpleNamespace(),
        name=name,
    )


def test_a_cuda_runtime_newer_than_the_driver_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ctypes.CDLL", load_fake_runtime)
    assert open_cuda_runtime()._library.name == "libcudart.so.12"
    monkeypatch.setattr(cuda_memory, "_candidates", lambda: iter(["libcudart.so.13"]))
    with pytest.raises(EngineError, match=r"libcudart\.so\.13, which is newer than the driver"):
        open_cuda_runtime()


@pytest.mark.trt
@pytest.mark.usefixtures("compiler")
def test_the_cuda_runtime_itself_says_what_is_wrong() -> None:
    if not isinstance(find_gpu(), NoGpu):
        pytest.skip("this machine has a GPU")
    runtime = open_cuda_runtime()
    assert isinstance(runtime, CudaRuntime)
    with pytest.raises(EngineError, match=r"CUDA refuses cudaMalloc: .*\(error \d+\)"):
        runtime.allocate(16)
    with pytest.raises(EngineError, match="cudaStreamCreate"):
        runtime.create_stream()


@pytest.mark.trt
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "function",
    [
        "cudaRuntimeGetVersion",
        "cudaDriverGetVersion",
        "cudaMalloc",
        "cudaMallocHost",
        "cudaFree",
        "cudaFreeHost",
        "cudaStreamCreateWithFlags",
        "cudaStreamDestroy",
        "cudaStreamSynchronize",
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaMemcpyAsync",
        "cudaGraphInstantiateWithFlags",
        "cudaGraphLaunch",
        "cudaGraphDestroy",
        "cudaGraphExecDestroy",
    ],
)
def test_every_cuda_call_exists(function: str) -> None:
    assert getattr(open_cuda_runtime()._library, function)
