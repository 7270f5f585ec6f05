"""Opening a bundle's graph: the target's engine, another one on request, never one in silence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from engines import ort
from engines.bundle import Bundle, open_bundle
from engines.errors import EngineError, OptionError
from engines.gpu import Gpu
from engines.opening import TARGETS_VARIABLE, open_session
from engines.targets import find_target
from engines.trt.plan import plan_path
from tests.small_graph import SIDE, write_small_bundle


def make_bundle(folder: Path, **fields: str) -> Bundle:
    return open_bundle(write_small_bundle(folder / "bundle", **fields))


def run(bundle: Bundle, engine: str | None = None) -> tuple[str, np.ndarray]:
    pixels = np.linspace(-1, 1, 3 * SIDE * SIDE, dtype=np.float32).reshape(1, 3, SIDE, SIDE)
    with open_session(bundle, engine=engine, threads=1) as session:
        return session.provider, session.run({"pixel_values": pixels})["visual_tokens"]


def test_a_cpu_bundle_runs_on_onnx_runtime(tmp_path: Path) -> None:
    assert run(make_bundle(tmp_path))[0] == "CPUExecutionProvider"


def test_an_x86_bundle_runs_on_openvino_with_a_cache_and_stays_whole(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    bundle = make_bundle(tmp_path, target="x86")
    provider, tokens = run(bundle)
    assert provider.startswith("OpenVINO") and provider.endswith("(fp32)")
    np.testing.assert_allclose(tokens, run(bundle, "ort")[1], atol=1e-5)
    assert list((bundle.local / "openvino").iterdir())
    open_bundle(bundle.root)


def test_a_jetson_bundle_without_its_plan_says_how_to_go_on(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, target="jetson-orin")
    with pytest.raises(
        EngineError, match=r"no such plan.*engines\.build .*bundle`\. To run.*--engine ort"
    ):
        run(bundle)
    assert run(bundle, "ort")[0] == "CPUExecutionProvider"


def test_a_plan_is_for_one_target(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="target jetson-orin has tensorrt"):
        run(make_bundle(tmp_path, target="jetson-orin"), "tensorrt-rtx")


def test_the_plan_of_this_gpu_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path, target="jetson-orin")
    l4 = Gpu("NVIDIA L4", 89, 24 << 30, False, "12.8", "570.1")
    monkeypatch.setattr("engines.gpu.find_gpu", lambda: l4)
    for name in ("jetson-orin", "l4"):  # as `engines.build --target l4` leaves it
        plan = plan_path(bundle, bundle.vision(), find_target(name))
        plan.parent.mkdir(exist_ok=True)
        plan.write_bytes(b"")
    with pytest.raises(EngineError, match=r"vision-tensorrt-sm89\.plan: its sidecar"):
        open_session(bundle)


def test_an_unknown_engine_offers_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--engine tensort: .*Did you mean tensorrt\?"):
        run(make_bundle(tmp_path), "tensort")


def test_a_target_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path, target="rover")
    with pytest.raises(OptionError, match=f"target rover, which is not known.*{TARGETS_VARIABLE}"):
        run(bundle)
    own = tmp_path / "mine.toml"
    own.write_text('[rover]\nlike = "cpu"\ntitle = "Rover"\n')
    monkeypatch.setenv(TARGETS_VARIABLE, str(own))
    assert run(bundle)[0] == "CPUExecutionProvider"


def test_onnx_runtime_without_cuda_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"CUDAExecutionProvider.*foveate\[cuda\]"):
        run(make_bundle(tmp_path), "ort-cuda")


def test_providers_on_a_gpu_keep_tf32_off_and_caches_in_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    class Recorder:
        def __init__(self, path: Path, *, providers: list[object]) -> None:
            asked.append(providers)

    monkeypatch.setattr(ort, "OrtSession", Recorder)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    bundle = make_bundle(tmp_path)
    open_session(bundle, engine="ort-cuda")
    open_session(bundle, engine="ort-tensorrt")
    assert asked[0] == [("CUDAExecutionProvider", {"use_tf32": "0"})]
    name, options = asked[1][0]  # type: ignore[index]
    assert name == "TensorrtExecutionProvider"
    assert options == {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(bundle.local / "ort-tensorrt"),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(bundle.local / "ort-tensorrt"),
    }
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    open_bundle(bundle.root)


def test_onnx_runtimes_tensorrt_is_refused_a_typed_graph(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the fp16 graph's FP32 selection"):
        run(make_bundle(tmp_path, precision="fp16"), "ort-tensorrt")
