"""On a machine with a CUDA GPU: TensorRT itself, against ONNX Runtime on the CPU.

None of these has run yet: no machine with a GPU has been at hand.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from benchmarks import random_graphs
from engines.build import PlanRequest, prepare_plan
from engines.bundle import Bundle, open_bundle
from engines.errors import EngineError
from engines.gpu import Gpu, NoGpu, find_gpu
from engines.manifest import Precision
from engines.opening import open_session
from engines.ort import OrtSession
from engines.targets import Target, load_targets
from engines.trt.builder import PlanTask, build_plan
from engines.trt.cuda_memory import open_cuda_runtime
from engines.trt.library import TrtLibrary, load_library_for, load_polygraphy
from engines.trt.plan import plan_path
from engines.trt.session import TrtSession
from tests.small_graph import SIDE, write_small_bundle

pytestmark = pytest.mark.gpu
RANDOM = np.random.default_rng(11)
LEAST_SAME = 0.9
"""Share of the slots that stand for the same patch; half-precision sums differ in their order."""


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = find_gpu()
    if isinstance(found, NoGpu):
        pytest.skip(found.reason)
    return found


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def target(request: pytest.FixtureRequest, gpu: Gpu) -> Target:
    for candidate in load_targets().values():
        if candidate.engine == request.param and candidate.sm == gpu.sm:
            return candidate
    pytest.skip(f"no {request.param} target for sm_{gpu.sm}")


@pytest.fixture
def library(target: Target) -> TrtLibrary:
    """Skip where it is not installed; everything else that goes wrong is a failure."""
    try:
        found = load_library_for(target)
        load_polygraphy(found)
    except EngineError as error:
        pytest.skip(str(error))
    return found


@pytest.fixture
def built(target: Target, library: TrtLibrary, tmp_path: Path) -> Bundle:
    bundle = open_bundle(write_small_bundle(tmp_path / "bundle", target=target.name))
    prepare_plan(bundle, bundle.vision(), target, PlanRequest())
    return bundle


def test_a_plan_gives_what_onnx_runtime_gives(built: Bundle) -> None:
    with open_session(built) as session, open_session(built, engine="ort") as reference:
        for batch in (1, 1, 1, 8, 3, 1, 8, 8, 8, 1, 1, 1):
            shape = (batch, 3, SIDE, SIDE)
            inputs = {"pixel_values": RANDOM.standard_normal(shape).astype(np.float32)}
            found, expected = session.run(inputs), reference.run(inputs)
            np.testing.assert_array_equal(found["patch_index"], expected["patch_index"])
            np.testing.assert_allclose(found["visual_tokens"], expected["visual_tokens"], atol=1e-4)


def test_a_changed_plan_is_refused_before_it_is_loaded(built: Bundle, target: Target) -> None:
    plan = plan_path(built, built.vision(), target)
    plan.write_bytes(plan.read_bytes()[:-1] + b"\0")
    with pytest.raises(EngineError, match="damaged or was replaced"):
        open_session(built)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "mixed"])
@pytest.mark.parametrize("reducer", random_graphs.NAMES)
def test_a_reducer_keeps_what_onnx_runtime_keeps(
    reducer: str, precision: Precision, target: Target, library: TrtLibrary, tmp_path: Path
) -> None:
    fp32, inputs = random_graphs.write_graph(tmp_path, reducer)
    typed = random_graphs.write_typed_graph(fp32, precision)
    sha256 = hashlib.sha256(typed.read_bytes()).hexdigest()
    options = PlanTask(typed, sha256, tmp_path / "a.plan", target, precision, inputs)
    result = build_plan(options)
    assert result.layers.engine is not None, "the layer report reads the engine on its own GPU"
    pixels = {"pixel_values": RANDOM.standard_normal((2, 3, 56, 56)).astype(np.float32)}
    plan = result.plan.read_bytes()
    with TrtSession(plan, library, open_cuda_runtime()) as session:
        found = session.run(pixels)
    with OrtSession(typed) as reference:
        expected = reference.run(pixels)
    same = float((found["patch_index"] == expected["patch_index"]).mean())
    assert same == 1.0 if precision == "fp32" else same >= LEAST_SAME


def test_onnx_runtime_on_cuda(gpu: Gpu, tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    bundle = open_bundle(write_small_bundle(tmp_path / "bundle"))
    inputs = {"pixel_values": RANDOM.standard_normal((2, 3, SIDE, SIDE)).astype(np.float32)}
    with open_session(bundle, engine="ort-cuda") as session:
        found = session.run(inputs)
    with open_session(bundle, engine="ort") as reference:
        expected = reference.run(inputs)
    np.testing.assert_array_equal(found["patch_index"], expected["patch_index"])
