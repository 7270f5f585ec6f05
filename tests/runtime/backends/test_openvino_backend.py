"""What is OpenVINO's own: one file with ONNX Runtime, fused attention, its cache, its settings."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.cpu_flags import has_amx
from engines.errors import BackendError, OptionError
from engines.manifest import LlmPrecision
from runtime.backends import openvino_backend
from runtime.backends.opening import open_backend
from runtime.backends.openvino_backend import OpenVinoBackend, open_openvino_backend
from runtime.backends.ort import open_ort_backend
from tests.tiny_language import tiny_llava, write_checkpoint, write_language_bundle

pytest.importorskip("openvino")

IDS = np.random.default_rng(0).integers(5, 300, 60)
PICTURE = np.random.default_rng(1).normal(size=(16, 64)).astype(np.float32)


@pytest.fixture
def backend(language_bundle: Bundle) -> Iterator[OpenVinoBackend]:
    opened = open_openvino_backend(language_bundle, threads=1)
    yield opened
    opened.close()


def operators_of(backend: OpenVinoBackend) -> Counter[str]:
    assert backend._decoder is not None
    graph = backend._decoder.compiled.get_runtime_model()
    return Counter(str(node.get_rt_info()["layerType"].value) for node in graph.get_ordered_ops())


def test_a_bundle_for_onnx_runtime_is_run(language_bundle: Bundle) -> None:
    assert [model.backend for model in language_bundle.manifest.language_models] == ["ort"]
    found = open_backend(language_bundle, "openvino", threads=1)
    expected = open_backend(language_bundle, "ort", threads=1)
    parts = [IDS[:5], PICTURE, IDS[5:]]
    np.testing.assert_allclose(found.prefill(parts), expected.prefill(parts), atol=1e-4)


def test_attention_rotation_and_cache_are_one_operator_each(backend: OpenVinoBackend) -> None:
    """Without the fusions the cache is copied for every token."""
    backend.prefill([IDS])
    found = operators_of(backend)
    assert found["ScaledDotProductAttention"] == 2  # one for each layer
    assert found["RoPE"] == 4  # of queries and keys
    assert not found["Softmax"] and not found["Broadcast"]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_weights_answer_like_onnx_runtimes(
    language_checkpoint: Path, tmp_path: Path, precision: LlmPrecision
) -> None:
    """The weights are the same numbers; activations are rounded by each in its own way."""
    bundle = write_language_bundle(tmp_path / "bundle", language_checkpoint, precision)
    ours, theirs = (open_backend(bundle, name, threads=1) for name in ("openvino", "ort"))
    for part in (IDS, PICTURE, IDS[:1], IDS[3:9]):
        found, expected = ours.prefill([part]), theirs.prefill([part])
        np.testing.assert_allclose(found, expected, atol=0.25)
    assert operators_of(ours)["FullyConnected"] == 11  # five for each layer, and the head


def test_rewinding_a_quantized_cache_is_exact(language_checkpoint: Path, tmp_path: Path) -> None:
    bundle = write_language_bundle(tmp_path / "bundle", language_checkpoint, "int4")
    backend = open_openvino_backend(bundle, threads=1)
    backend.prefill([IDS[:30]])
    expected = backend.prefill([np.array([7])])
    for _ in range(3):
        backend.prefill([IDS[30:]])
        backend.rewind(30)
        np.testing.assert_allclose(backend.prefill([np.array([7])]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 4}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_every_family_gives_the_logits_of_onnx_runtime(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_llava(family, **changes))
    bundle = write_language_bundle(tmp_path / "bundle", checkpoint)
    ours, theirs = open_openvino_backend(bundle, threads=1), open_ort_backend(bundle, threads=1)
    for part in (IDS, PICTURE, IDS[:1]):
        np.testing.assert_allclose(ours.prefill([part]), theirs.prefill([part]), atol=1e-4)
    assert operators_of(ours)["ScaledDotProductAttention"] == 2


def test_a_run_that_fails_leaves_the_conversation_as_it_was(
    backend: OpenVinoBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.prefill([IDS[:20]])
    expected = backend.fork().prefill([IDS[20:]])
    request = backend._request

    class Failing:
        def infer(self, inputs: dict[str, Any], share_inputs: bool) -> None:
            request.infer(inputs, share_inputs=share_inputs)  # the cache has grown
            raise RuntimeError("no memory is left")

        def query_state(self) -> Any:
            return request.query_state()

    monkeypatch.setattr(backend, "_request", Failing())
    with pytest.raises(BackendError, match=r"after 20 .no memory is left.*--context"):
        backend.prefill([IDS[20:]])
    monkeypatch.setattr(backend, "_request", request)
    assert backend.position == 20
    np.testing.assert_allclose(backend.prefill([IDS[20:]]), expected, atol=1e-5)


def test_amx_computes_in_bf16_and_float_decoders_are_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hints = {}
    for amx in (False, True):
        monkeypatch.setattr(openvino_backend, "has_amx", lambda amx=amx: amx)
        for precision in ("int4", "fp32"):
            settings = openvino_backend._settings(precision)
            hints[precision, amx] = settings["INFERENCE_PRECISION_HINT"]
    assert hints == {
        ("int4", False): "f32",
        ("int4", True): "bf16",
        ("fp32", False): "f32",
        ("fp32", True): "f32",
    }


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx512_bf16 avx512_vnni", False), ("amx_tile amx_bf16", True)]
)
def test_amx_is_read_from_the_cpus_flags(tmp_path: Path, flags: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n")
    assert has_amx(tmp_path / "cpuinfo") is expected


def test_a_missing_openvino_is_told_with_the_command(
    language_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"not installed.*foveate\[openvino\].*--backend ort"):
        open_openvino_backend(language_bundle)


def test_a_bundle_without_an_onnx_decoder(language_bundle: Bundle) -> None:
    model = language_bundle.manifest.language_models[0].model_copy(update={"backend": "llamacpp"})
    manifest = language_bundle.manifest.model_copy(update={"language_models": (model,)})
    with pytest.raises(OptionError, match='no decoder for the backend "openvino", only for llama'):
        open_openvino_backend(replace(language_bundle, manifest=manifest))


@pytest.fixture
def copied(language_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy that a test may damage."""
    shutil.copytree(language_bundle.root, tmp_path / "bundle")
    return replace(language_bundle, root=tmp_path / "bundle")


def test_a_graph_that_is_no_decoder(copied: Bundle) -> None:
    shutil.copy(copied.root / "vision.onnx", copied.root / "llm" / "ort" / "model.onnx")
    with pytest.raises(BackendError, match=r"is not a decoder that export\.build wrote"):
        open_openvino_backend(copied)


def test_a_damaged_decoder_is_explained(copied: Bundle) -> None:
    (copied.root / "llm" / "ort" / "model.onnx.data").write_bytes(b"cut short")
    with pytest.raises(BackendError, match=r"model\.onnx .*is not a decoder that OpenVINO"):
        open_openvino_backend(copied)
