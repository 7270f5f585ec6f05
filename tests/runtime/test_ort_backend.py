"""The ONNX Runtime backend against transformers, and its cache against itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from engines.bundle import Bundle
from engines.errors import BackendError, BundleError, EngineError, OptionError
from runtime.backends import Embeddings
from runtime.backends.ort import OrtBackend, open_ort_backend
from runtime.embeddings import EmbeddingTable

IDS = np.random.default_rng(0).integers(5, 300, 60)


@pytest.fixture(scope="module")
def loaded(language_bundle: Bundle) -> OrtBackend:
    return open_ort_backend(language_bundle, threads=1)


@pytest.fixture
def backend(loaded: OrtBackend) -> Iterator[OrtBackend]:
    loaded.rewind(0)
    yield loaded
    loaded.rewind(0)


def reference_logits(model: LlavaForConditionalGeneration, rows: Embeddings) -> np.ndarray:
    with torch.no_grad():
        return model(inputs_embeds=torch.from_numpy(rows)[None]).logits[0].numpy()


def visual_tokens(count: int = 16, width: int = 64) -> Embeddings:
    return np.random.default_rng(1).normal(size=(count, width)).astype(np.float32)


def test_logits_equal_transformers(
    backend: OrtBackend, language_reference: LlavaForConditionalGeneration
) -> None:
    picture = visual_tokens()
    logits = backend.prefill([IDS[:5], picture, IDS[5:]])
    rows = np.concatenate([backend.embed(IDS[:5]), picture, backend.embed(IDS[5:])])
    expected = reference_logits(language_reference, rows)
    assert logits.dtype == np.float32
    assert backend.position == len(rows) == 76
    np.testing.assert_allclose(logits, expected[-1], atol=2e-5)


def test_embedding_rows_are_those_of_the_checkpoint(
    backend: OrtBackend, language_reference: LlavaForConditionalGeneration
) -> None:
    expected = language_reference.get_input_embeddings().weight.detach().numpy()[IDS]
    assert np.array_equal(backend.embed(IDS), expected)


@pytest.mark.parametrize(
    "cuts", [(60,), (1, 60), (20, 60), (20, 21, 22, 40, 60), tuple(range(1, 61))]
)
def test_prefill_in_pieces_equals_one_prefill(
    backend: OrtBackend, language_reference: LlavaForConditionalGeneration, cuts: tuple[int, ...]
) -> None:
    expected = reference_logits(language_reference, backend.embed(IDS))
    start = 0
    for end in cuts:
        logits = backend.prefill([IDS[start:end]])
        np.testing.assert_allclose(logits, expected[end - 1], atol=2e-5)
        start = end


def test_long_prefill_runs_in_chunks(
    backend: OrtBackend, language_reference: LlavaForConditionalGeneration
) -> None:
    ids = np.random.default_rng(2).integers(5, 300, 900)
    expected = reference_logits(language_reference, backend.embed(ids))
    np.testing.assert_allclose(backend.prefill([ids]), expected[-1], atol=2e-5)


@pytest.mark.parametrize("position", [0, 1, 17, 59])
def test_rewind_forgets(
    backend: OrtBackend, language_reference: LlavaForConditionalGeneration, position: int
) -> None:
    backend.prefill([IDS])
    backend.rewind(position)
    other = np.flip(IDS)[: 70 - position]
    logits = backend.prefill([other])
    rows = backend.embed(np.concatenate([IDS[:position], other]))
    np.testing.assert_allclose(logits, reference_logits(language_reference, rows)[-1], atol=2e-5)


def test_decode_equals_prefill_of_one(backend: OrtBackend) -> None:
    backend.prefill([IDS[:-1]])
    by_decode = backend.decode(int(IDS[-1]))
    backend.rewind(len(IDS) - 1)
    assert np.array_equal(by_decode, backend.prefill([IDS[-1:]]))


def test_a_fork_goes_its_own_way(
    backend: OrtBackend, language_reference: LlavaForConditionalGeneration
) -> None:
    backend.prefill([IDS[:40]])
    fork = backend.fork()
    assert fork.position == 40
    ours, theirs = backend.prefill([IDS[40:]]), fork.prefill([IDS[:10]])
    together = reference_logits(language_reference, backend.embed(IDS))
    apart = reference_logits(language_reference, backend.embed(np.append(IDS[:40], IDS[:10])))
    np.testing.assert_allclose(ours, together[-1], atol=2e-5)
    np.testing.assert_allclose(theirs, apart[-1], atol=2e-5)
    fork.close()
    assert backend.position == 60
    backend.decode(7)


def test_logits_handed_out_are_the_callers(backend: OrtBackend) -> None:
    first = backend.prefill([IDS[:10]])
    kept = first.copy()
    backend.prefill([IDS[10:20]])
    assert np.array_equal(first, kept)


def test_context_length_is_kept(language_bundle: Bundle) -> None:
    small = open_ort_backend(language_bundle, threads=1, context_length=50)
    small.prefill([IDS[:48]])
    with pytest.raises(BackendError, match="5 more positions after 48 make 53, and the context"):
        small.prefill([IDS[:5]])
    assert small.position == 48
    small.prefill([IDS[:2]])
    with pytest.raises(BackendError, match="context holds 50"):
        small.decode(5)
    for length in (0, 1025):
        with pytest.raises(BackendError, match=f"context_length is {length}: expected 1 to 1024"):
            open_ort_backend(language_bundle, context_length=length)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (visual_tokens(width=32), "embeddings of width 32, and the language model takes 64"),
        (visual_tokens().astype(np.float64), r"is float64\[16, 64\]: expected int64\[N\]"),
        (np.full((3, 64), np.nan, np.float32), "holds NaN or infinity"),
        (np.zeros((0, 64), np.float32), "empty prompt"),
    ],
)
def test_bad_parts_are_refused(backend: OrtBackend, part: np.ndarray, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        backend.prefill([part])
    assert backend.position == 0


def test_an_id_outside_the_vocabulary_is_refused(backend: OrtBackend) -> None:
    with pytest.raises(BundleError, match="Token id 304 has no row in the embedding table"):
        backend.prefill([np.array([5, 304])])


@pytest.mark.parametrize("position", [-1, 11])
def test_a_rewind_goes_backwards(backend: OrtBackend, position: int) -> None:
    backend.prefill([IDS[:10]])
    with pytest.raises(BackendError, match=f"rewind to position {position}: expected 0 to 10"):
        backend.rewind(position)


def test_a_closed_backend_says_so(language_bundle: Bundle) -> None:
    backend = open_ort_backend(language_bundle, threads=1)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="was closed"):
        backend.prefill([IDS])


def test_cuda_is_refused_where_there_is_none(language_bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="CUDAExecutionProvider"):
        open_ort_backend(language_bundle, device="cuda")


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 64, "its header claims"),
        (b"\x02" + b"\x00" * 7 + b"{}", "KeyError: 'embed_tokens'"),
        (None, "No such file"),
    ],
)
def test_a_damaged_embedding_table_is_explained(
    language_bundle: Bundle, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / language_bundle.manifest.text.embeddings
    file.parent.mkdir(parents=True)
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BundleError, match=message):
        EmbeddingTable(replace(language_bundle, root=tmp_path))


def test_an_embedding_table_of_another_model_is_refused(language_bundle: Bundle) -> None:
    text = language_bundle.manifest.text.model_copy(update={"hidden_size": 128})
    manifest = language_bundle.manifest.model_copy(update={"text": text})
    with pytest.raises(BundleError, match=r"'shape': \[304, 64\].*bundle.json expects"):
        EmbeddingTable(replace(language_bundle, manifest=manifest))
