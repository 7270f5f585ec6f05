"""What is ONNX Runtime's own: providers, files, and a cache that is bound in place."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from engines.bundle import Bundle
from engines.errors import BackendError, EngineError, OptionError
from runtime.backends import ort
from runtime.backends.opening import open_backend
from runtime.backends.ort import open_ort_backend


def test_cuda_is_refused_where_there_is_none(language_bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="CUDAExecutionProvider"):
        open_ort_backend(language_bundle, device="cuda")


@pytest.mark.parametrize("asked", ["by the user", "by the bundle"])
def test_a_gpu_is_asked_of_onnx_runtime(
    language_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """The provider list reaches ONNX Runtime, through the function that every command uses."""
    given: list[object] = []

    def create(path: Path, *, threads: int | None, providers: list[str]) -> None:
        given.append(providers)
        raise EngineError("far enough")

    monkeypatch.setattr(ort, "create_inference_session", create)
    (model,) = language_bundle.manifest.language_models
    on_gpu = model.model_copy(update={"device": "cuda"})
    manifest = language_bundle.manifest.model_copy(update={"language_models": (on_gpu,)})
    with pytest.raises(EngineError, match="far enough"):
        if asked == "by the user":
            open_backend(language_bundle, device="cuda")
        else:
            open_backend(replace(language_bundle, manifest=manifest))
    with pytest.raises(EngineError, match="far enough"):
        open_backend(replace(language_bundle, manifest=manifest), device="cpu")
    assert given == [["CUDAExecutionProvider"], ["CPUExecutionProvider"]]


def test_what_another_backend_has_is_refused(language_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match=r"--kv-cache q8: .*Use --backend llamacpp"):
        open_backend(language_bundle, kv_cache="q8")
    with pytest.raises(OptionError, match=r"--llm-device cuda: llama\.cpp uses the GPU"):
        open_backend(language_bundle, "llamacpp", device="cuda")


def test_a_bundle_without_a_decoder_for_it(language_bundle: Bundle) -> None:
    model = language_bundle.manifest.language_models[0].model_copy(update={"backend": "llamacpp"})
    manifest = language_bundle.manifest.model_copy(update={"language_models": (model,)})
    with pytest.raises(OptionError, match='no decoder for the backend "ort", only for llamacpp'):
        open_ort_backend(replace(language_bundle, manifest=manifest))


def test_a_damaged_decoder_is_explained(language_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "llm" / "ort").mkdir(parents=True)
    (tmp_path / "llm" / "ort" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"model\.onnx .*not a graph that ONNX Runtime"):
        open_ort_backend(replace(language_bundle, root=tmp_path))


@pytest.fixture
def copied(language_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy that a test may damage."""
    shutil.copytree(language_bundle.root, tmp_path / "bundle")
    return replace(language_bundle, root=tmp_path / "bundle")


def test_a_graph_that_is_no_decoder(copied: Bundle) -> None:
    shutil.copy(copied.root / "vision.onnx", copied.root / "llm" / "ort" / "model.onnx")
    with pytest.raises(BackendError, match=r"is not a decoder that export\.build wrote"):
        open_ort_backend(copied)


def test_a_cache_of_unknown_width_is_refused(copied: Bundle) -> None:
    """As the model builder leaves it; the cache is allocated by these shapes."""
    file = copied.root / "llm" / "ort" / "model.onnx"
    model = onnx.load(str(file), load_external_data=False)
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            value.type.tensor_type.shape.dim[3].dim_param = "kv_cache_dim"
    onnx.save(model, str(file))
    with pytest.raises(BackendError, match="of one known shape"):
        open_ort_backend(copied)


def test_open_backend_takes_the_bundles_first(language_bundle: Bundle) -> None:
    assert open_backend(language_bundle, threads=1).name == "ort"
    with pytest.raises(OptionError, match=r'no language backend "abacus", expected one of ort'):
        open_backend(language_bundle, "abacus")


def test_a_cache_that_no_machine_holds_is_told(language_bundle: Bundle) -> None:
    manifest = language_bundle.manifest
    text = manifest.text.model_copy(update={"context_length": 10**15})
    endless = replace(language_bundle, manifest=manifest.model_copy(update={"text": text}))
    with pytest.raises(BackendError, match=r"takes 512000000\.0 GB, which this machine does not"):
        open_ort_backend(endless, threads=1, context_length=10**15)


def test_running_out_of_memory_leaves_the_conversation_as_it_was(
    language_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_ort_backend(language_bundle, threads=1)
    backend.prefill([np.arange(5, 15)])

    class Full:
        def run_with_iobinding(self, binding: object) -> None:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 9\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "_decoder", replace(backend._decoder, session=Full()))
        with pytest.raises(BackendError, match=r"failed on 3 positions after 10 \(Failed to alloc"):
            backend.prefill([np.arange(3)])
    assert backend.position == 10
    backend.prefill([np.array([7])])
    assert backend.position == 11


def test_only_what_is_filled_takes_memory(language_bundle: Bundle) -> None:
    """A cache for a long context is no cost until it is used."""
    backend = open_ort_backend(language_bundle, threads=1)
    backend.prefill([np.arange(5, 15)])
    caches = backend._cache.values()
    assert all(cache.shape == (1, 2, 1024, 16) for cache in caches)
    assert all(cache[:, :, :10].any() and not cache[:, :, 10:].any() for cache in caches)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(language_bundle: Bundle, wrong: float) -> None:
    backend = open_ort_backend(language_bundle, threads=1)
    run = backend._append

    def overflow(*given: np.ndarray) -> None:
        run(*given)
        backend._logits[..., 7] = wrong

    backend._append = overflow  # type: ignore[method-assign]
    told = f"after 2 positions are not numbers: 1 of .* that of token 7 \\({wrong}\\)"
    with pytest.raises(BackendError, match=told):
        backend.prefill([np.array([5, 6], np.int64)])
