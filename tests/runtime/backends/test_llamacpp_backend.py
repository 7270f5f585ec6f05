"""What only the llama.cpp backend does: what it refuses, and how its conversations share memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from engines.bundle import Bundle
from engines.errors import BackendError, OptionError
from engines.gpu import Gpu
from engines.manifest import LanguageModel
from engines.memory.context_length import ContextNeed
from export.checkpoint.llava import open_checkpoint
from export.language.gguf_decoder import write_gguf
from runtime.backends import llama_decoder, llama_library
from runtime.backends.llama_library import load_llama_library, uses_amx
from runtime.backends.llamacpp import open_llamacpp_backend
from tests.tiny_language import tiny_llava, write_checkpoint, write_language_bundle

IDS = np.random.default_rng(0).integers(5, 300, 60)
WITH_AMX = "CPU : AVX512 = 1 | AVX512_VNNI = 1 | AMX_INT8 = 1 | REPACK = 1 | "


def with_gguf(bundle: Bundle, root: Path) -> Bundle:
    """The bundle as if `model.gguf` and the embedding table lay in another directory."""
    model = LanguageModel(backend="llamacpp", file="model.gguf", precision="f16")
    manifest = bundle.manifest.model_copy(update={"language_models": (model,)})
    table = root / manifest.text.embeddings
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_bytes((bundle.root / manifest.text.embeddings).read_bytes())
    return replace(bundle, root=root, manifest=manifest)


@pytest.fixture(scope="module")
def gguf_bundle(
    language_bundle: Bundle, language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    root = tmp_path_factory.mktemp("gguf")
    write_gguf(open_checkpoint(language_checkpoint), root / "model.gguf")
    return with_gguf(language_bundle, root)


@pytest.fixture
def library() -> Iterator[object]:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python: run `make test-llamacpp`")
    yield load_llama_library()


def test_amx_is_known_by_what_the_build_says() -> None:
    assert uses_amx(WITH_AMX)
    assert not uses_amx(WITH_AMX.replace("AMX_INT8 = 1", "AMX_INT8 = 0"))
    assert not uses_amx("CPU : NEON = 1 | DOTPROD = 1 | ")


def test_a_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(llama_library, "import_module", missing)
    with pytest.raises(BackendError, match=r'pip install "foveate\[llamacpp\]"'):
        load_llama_library.__wrapped__()


def test_a_package_that_it_imports_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str) -> None:
        raise ModuleNotFoundError("No module named 'diskcache'", name="diskcache")

    monkeypatch.setattr(llama_library, "import_module", lacking)
    with pytest.raises(BackendError, match=r"is installed, but not diskcache.*pip install diskc"):
        load_llama_library.__wrapped__()


def test_a_library_of_another_machine_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(llama_library, "import_module", broken)
    with pytest.raises(BackendError, match=r"does not load \(libgomp.*mno-amx-tile"):
        load_llama_library.__wrapped__()


def test_a_bundle_without_a_gguf_decoder(language_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match='no decoder for the backend "llamacpp", only for ort'):
        open_llamacpp_backend(language_bundle)


@pytest.mark.llamacpp
def test_amx_kernels_are_switched_off(
    library: object, gguf_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(library, "llama_print_system_info", WITH_AMX.encode)
    options = []
    load = library.llama_model_load_from_file
    monkeypatch.setattr(
        library,
        "llama_model_load_from_file",
        lambda file, given: options.append(given.use_extra_bufts) or load(file, given),
    )
    with caplog.at_level(logging.WARNING):
        open_llamacpp_backend(gguf_bundle).close()
    assert options == [False]
    assert "AMX kernels, which crash" in caplog.text


@pytest.mark.llamacpp
def test_this_build_has_no_amx_kernels(library: object) -> None:
    assert not uses_amx(library.llama_print_system_info().decode())


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: b"", r"not a GGUF file: it begins with b''"),
        (lambda whole: b"PK\x03\x04" + whole[4:], "not a GGUF file"),
        (lambda whole: whole[: len(whole) // 2], "cannot load it .*file bounds"),
        (lambda whole: whole[:100], "cannot load it"),
        (lambda whole: whole[:40] + b"\xff" * 400 + whole[440:], "cannot load it"),
        (
            lambda whole: whole.replace(b"output_norm.weight", b"output_bent.weight"),
            "norm.weight' not found",
        ),
    ],
)
def test_a_damaged_file_is_refused(
    library: object, gguf_bundle: Bundle, tmp_path: Path, damage, message: str
) -> None:
    (tmp_path / "model.gguf").write_bytes(damage((gguf_bundle.root / "model.gguf").read_bytes()))
    with pytest.raises(BackendError, match=message):
        open_llamacpp_backend(with_gguf(gguf_bundle, tmp_path))


@pytest.mark.llamacpp
def test_a_missing_file_is_refused(library: object, gguf_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"model\.gguf cannot be read \(No such file"):
        open_llamacpp_backend(with_gguf(gguf_bundle, tmp_path))


@pytest.mark.llamacpp
def test_a_decoder_of_another_model_is_refused(
    library: object, gguf_bundle: Bundle, tmp_path: Path
) -> None:
    rows = np.zeros((152, 128), np.float16)
    table = gguf_bundle.manifest.text.embeddings
    other = with_gguf(gguf_bundle, tmp_path)
    save_file({"embed_tokens": rows}, tmp_path / table)
    (tmp_path / "model.gguf").write_bytes((gguf_bundle.root / "model.gguf").read_bytes())
    text = other.manifest.text.model_copy(update={"vocabulary": 152, "hidden_size": 128})
    manifest = other.manifest.model_copy(update={"text": text})
    with pytest.raises(BackendError, match=r"has 304 token ids and hidden size 64, .* 152 and 128"):
        open_llamacpp_backend(replace(other, manifest=manifest))


@pytest.mark.llamacpp
def test_a_cache_that_memory_cannot_hold_is_never_asked_for(
    library: object, gguf_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:    255 kB\n")
    monkeypatch.setattr(llama_decoder, "_MEMORY_FILE", tmp_path / "meminfo")
    with pytest.raises(BackendError, match=r"cache of 1024 positions takes 0.0 GB, .* 0.0 GB free"):
        open_llamacpp_backend(gguf_bundle)  # 1024 positions x 2 layers x 2 heads x 32 x 2 bytes
    (tmp_path / "meminfo").write_text("MemAvailable:    256 kB\n")
    open_llamacpp_backend(gguf_bundle).close()


@pytest.mark.llamacpp
def test_a_gpu_that_shares_the_memory_is_checked_too(
    library: object, gguf_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a Jetson; a GPU with a memory of its own is llama.cpp's to judge."""
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:    255 kB\n")
    monkeypatch.setattr(llama_decoder, "_MEMORY_FILE", tmp_path / "meminfo")
    monkeypatch.setattr(library, "llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr(llama_decoder, "gpu_shares_memory", lambda: True)
    with pytest.raises(BackendError, match=r"cache of 1024 positions takes"):
        open_llamacpp_backend(gguf_bundle)
    monkeypatch.setattr(llama_decoder, "gpu_shares_memory", lambda: False)
    open_llamacpp_backend(gguf_bundle).close()


@pytest.mark.parametrize(("integrated", "shared"), [(True, True), (False, False)])
def test_an_integrated_gpu_shares_the_memory(
    monkeypatch: pytest.MonkeyPatch, integrated: bool, shared: bool
) -> None:
    gpu = Gpu("Orin", 87, 8_000_000_000, integrated, "12.6", "540.4.0")
    monkeypatch.setattr(llama_decoder, "find_gpu", lambda: gpu)
    assert llama_decoder.gpu_shares_memory() is shared


@pytest.fixture(scope="module")
def wide_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A decoder whose heads have 32 numbers, as many as share a scale in 8 bits."""
    root = tmp_path_factory.mktemp("wide")
    model = tiny_llava(num_attention_heads=2, num_key_value_heads=2)
    checkpoint = write_checkpoint(root / "checkpoint", model)
    opened = write_language_bundle(root / "bundle", checkpoint)
    write_gguf(open_checkpoint(checkpoint), root / "gguf" / "model.gguf")
    return with_gguf(opened, root / "gguf")


@pytest.mark.llamacpp
def test_a_cache_of_8_bits_answers_nearly_the_same(library: object, wide_bundle: Bundle) -> None:
    half = open_llamacpp_backend(wide_bundle, threads=1)
    eight = open_llamacpp_backend(wide_bundle, threads=1, kv_cache="q8")
    expected, found = half.prefill([IDS]), eight.prefill([IDS])
    assert not np.array_equal(found, expected), "the cache is rounded"
    np.testing.assert_allclose(found, expected, atol=0.3)  # of logits up to 3.2
    half.close()
    eight.close()


def test_heads_that_are_too_narrow_for_8_bits(gguf_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match=r"quantizes 32 numbers of a head together, .* have 16"):
        open_llamacpp_backend(gguf_bundle, kv_cache="q8")


def test_a_float32_decoder_keeps_a_float32_cache(wide_bundle: Bundle) -> None:
    (model,) = wide_bundle.manifest.language_models
    exact = model.model_copy(update={"precision": "f32"})
    manifest = wide_bundle.manifest.model_copy(update={"language_models": (exact,)})
    with pytest.raises(OptionError, match="GGUF file is float32"):
        open_llamacpp_backend(replace(wide_bundle, manifest=manifest), kv_cache="q8")


@pytest.mark.llamacpp
def test_the_context_is_what_is_needed(library: object, gguf_bundle: Bundle) -> None:
    one = ContextNeed(exchanges=1)
    backend = open_llamacpp_backend(gguf_bundle, threads=1, need=one)
    assert backend.context_length == 512 < gguf_bundle.manifest.text.context_length
    backend.close()


@pytest.mark.llamacpp
@pytest.mark.parametrize("length", [0, 1025])
def test_context_length_is_bounded(library: object, gguf_bundle: Bundle, length: int) -> None:
    with pytest.raises(BackendError, match=f"context_length is {length}: expected 1 to 1024"):
        open_llamacpp_backend(gguf_bundle, context_length=length)


@pytest.mark.llamacpp
def test_gpu_layers_need_a_build_with_a_gpu(library, gguf_bundle: Bundle) -> None:
    if library.llama_supports_gpu_offload():
        pytest.skip("this build of llama.cpp has GPU support")
    with pytest.raises(BackendError, match=r"gpu_layers is -1, .*DGGML_CUDA=on"):
        open_llamacpp_backend(gguf_bundle, gpu_layers=-1)


@pytest.mark.llamacpp
def test_forks_share_the_cache_and_say_when_it_is_full(
    library: object, gguf_bundle: Bundle
) -> None:
    backend = open_llamacpp_backend(gguf_bundle, threads=1, context_length=256)
    backend.prefill([np.tile(IDS, 3)])  # 180 of 256
    forks = [backend.fork() for _ in range(7)]
    with pytest.raises(BackendError, match="8 conversations share this model already"):
        backend.fork()
    first = forks[0].prefill([IDS])
    forks[1].prefill([IDS[:10]])
    with pytest.raises(BackendError, match="256 positions is full: forked conversations share it"):
        forks[2].prefill([IDS])
    assert forks[2].position == 180
    forks[0].close()
    np.testing.assert_allclose(forks[2].prefill([IDS]), first, atol=1e-3)
    assert forks[2].position == 240


@pytest.mark.llamacpp
def test_the_model_outlives_the_first_conversation(library: object, gguf_bundle: Bundle) -> None:
    backend = open_llamacpp_backend(gguf_bundle, threads=1)
    backend.prefill([IDS])
    fork = backend.fork()
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="was closed"):
        backend.prefill([IDS])
    fork.prefill([np.array([7])])
    fork.close()
    with pytest.raises(BackendError, match="was closed"):
        fork.prefill([np.array([7])])
