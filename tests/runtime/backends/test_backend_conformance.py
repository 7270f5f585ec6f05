"""What every language backend does alike; each runs all of it against transformers in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from engines.bundle import Bundle, open_bundle, write_bundle
from engines.errors import BackendError, BundleError
from engines.manifest import Manifest
from export.checkpoint.llava import open_checkpoint
from export.language.gguf_decoder import write_gguf
from export.language.gguf_quantize import export_gguf
from export.language.onnx_decoder import export_language
from runtime.backends import LanguageBackend
from runtime.backends.llama_decoder import LlamaDecoder
from runtime.backends.llamacpp import LlamaCppBackend, open_llamacpp_backend
from runtime.backends.openvino_backend import open_openvino_backend
from runtime.backends.ort import open_ort_backend
from runtime.language.embeddings import EmbeddingTable
from runtime.language.generate import Generation, GenerationOptions
from runtime.language.parts import Embeddings
from runtime.language.prompt import PromptWriter, Turn
from tests.tiny_bundle import tiny_manifest

IDS = np.random.default_rng(0).integers(5, 300, 60)
PICTURE = np.random.default_rng(1).normal(size=(16, 64)).astype(np.float32)
TOLERANCE = 1e-4
HALF_TOLERANCE = 0.05
OPEN: dict[str, Callable[..., LanguageBackend]] = {
    "ort": open_ort_backend,
    "llamacpp": open_llamacpp_backend,
    "openvino": open_openvino_backend,
}
Opened = Callable[[int | None], LanguageBackend]
BACKENDS = ["ort", pytest.param("llamacpp", marks=pytest.mark.llamacpp), "openvino"]


@pytest.fixture(scope="module")
def bundle(language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One bundle with an exact decoder for each backend."""
    destination = tmp_path_factory.mktemp("backends") / "both"
    checkpoint = open_checkpoint(language_checkpoint)
    with write_bundle(destination) as draft:
        language = export_language(checkpoint, draft.root, "fp32")
        gguf = export_gguf(checkpoint, draft.root, "f32")
        draft.path("vision.onnx").write_text("no graph")
        fields = tiny_manifest(
            text=language.text,
            prompt=language.prompt,
            language_models=[language.model, gguf.model],
        )
        draft.describe(Manifest.model_validate(fields))
    return open_bundle(destination)


@pytest.fixture(scope="module", params=BACKENDS)
def loaded(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[LanguageBackend]:
    if request.param == "llamacpp":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python: run `make test-llamacpp`")
    if request.param == "openvino":
        pytest.importorskip("openvino")
    backend = OPEN[request.param](bundle, threads=1)
    yield backend
    backend.close()


@pytest.fixture
def backend(loaded: LanguageBackend) -> Iterator[LanguageBackend]:
    loaded.rewind(0)
    yield loaded
    loaded.rewind(0)


def reference_logits(model: LlavaForConditionalGeneration, rows: Embeddings) -> np.ndarray:
    with torch.no_grad():
        return model(inputs_embeds=torch.from_numpy(rows)[None]).logits[0].numpy()


def test_text_and_visual_tokens_give_the_logits_of_transformers(
    backend: LanguageBackend, language_reference: LlavaForConditionalGeneration
) -> None:
    logits = backend.prefill([IDS[:5], PICTURE, IDS[5:]])
    rows = np.concatenate([backend.embed(IDS[:5]), PICTURE, backend.embed(IDS[5:])])
    assert logits.dtype == np.float32
    assert backend.position == len(rows) == 76
    np.testing.assert_allclose(
        logits, reference_logits(language_reference, rows)[-1], atol=TOLERANCE
    )


@pytest.mark.parametrize("cuts", [(60,), (1, 60), (20, 21, 40, 60), tuple(range(1, 61))])
def test_prefill_in_pieces_equals_one_prefill(
    backend: LanguageBackend,
    language_reference: LlavaForConditionalGeneration,
    cuts: tuple[int, ...],
) -> None:
    expected = reference_logits(language_reference, backend.embed(IDS))
    start = 0
    for end in cuts:
        logits = backend.prefill([IDS[start:end]])
        np.testing.assert_allclose(logits, expected[end - 1], atol=TOLERANCE)
        start = end


def test_a_prompt_longer_than_one_batch(
    backend: LanguageBackend, language_reference: LlavaForConditionalGeneration
) -> None:
    ids = np.random.default_rng(2).integers(5, 300, 900)
    expected = reference_logits(language_reference, backend.embed(ids))
    np.testing.assert_allclose(backend.prefill([ids]), expected[-1], atol=TOLERANCE)


@pytest.mark.parametrize("position", [0, 1, 17, 59])
def test_rewind_forgets(
    backend: LanguageBackend, language_reference: LlavaForConditionalGeneration, position: int
) -> None:
    backend.prefill([IDS])
    backend.rewind(position)
    other = np.flip(IDS)[: 70 - position]
    logits = backend.prefill([other])
    rows = backend.embed(np.concatenate([IDS[:position], other]))
    np.testing.assert_allclose(
        logits, reference_logits(language_reference, rows)[-1], atol=TOLERANCE
    )


def test_a_fork_goes_its_own_way(
    backend: LanguageBackend, language_reference: LlavaForConditionalGeneration
) -> None:
    backend.prefill([IDS[:40]])
    fork = backend.fork()
    assert fork.position == 40
    ours, theirs = backend.prefill([IDS[40:]]), fork.prefill([IDS[:10]])
    together = reference_logits(language_reference, backend.embed(IDS))
    apart = reference_logits(language_reference, backend.embed(np.append(IDS[:40], IDS[:10])))
    np.testing.assert_allclose(ours, together[-1], atol=TOLERANCE)
    np.testing.assert_allclose(theirs, apart[-1], atol=TOLERANCE)
    fork.rewind(5)
    fork.close()
    assert backend.position == 60
    np.testing.assert_allclose(
        backend.decode(7),
        reference_logits(language_reference, backend.embed(np.append(IDS, 7)))[-1],
        atol=TOLERANCE,
    )


def test_another_conversation_begins_empty_and_apart(
    backend: LanguageBackend, language_reference: LlavaForConditionalGeneration
) -> None:
    backend.prefill([IDS[:40]])
    if not backend.capabilities.apart:
        with pytest.raises(BackendError, match="share one cache"):
            backend.another()
        return
    other = backend.another()
    assert other.position == 0
    expected = reference_logits(language_reference, backend.embed(IDS[40:]))
    np.testing.assert_allclose(other.prefill([IDS[40:]]), expected[-1], atol=TOLERANCE)
    other.close()
    assert backend.position == 40


def test_logits_handed_out_are_the_callers(backend: LanguageBackend) -> None:
    first = backend.prefill([IDS[:10]])
    kept = first.copy()
    backend.prefill([IDS[10:20]])
    assert np.array_equal(first, kept)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (np.zeros((3, 32), np.float32), "embeddings of width 32, and the language model takes 64"),
        (np.zeros((3, 64), np.float64), r"is float64\[3, 64\]: expected int64\[N\]"),
        (np.full((3, 64), np.nan, np.float32), "holds NaN or infinity"),
        (np.zeros((0, 64), np.float32), "empty prompt"),
        (np.ones(1025, np.int64), "1025 more positions after 0 make 1025, and the context holds"),
    ],
)
def test_bad_parts_are_refused(backend: LanguageBackend, part: np.ndarray, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        backend.prefill([part])
    assert backend.position == 0


@pytest.mark.parametrize("position", [-1, 11])
def test_a_rewind_goes_backwards(backend: LanguageBackend, position: int) -> None:
    backend.prefill([IDS[:10]])
    with pytest.raises(BackendError, match=f"rewind to position {position}: expected 0 to 10"):
        backend.rewind(position)


def test_an_id_outside_the_vocabulary_is_refused(backend: LanguageBackend) -> None:
    with pytest.raises(BundleError, match="Token id 304 has no row in the embedding table"):
        backend.prefill([np.array([5, 304])])


def test_embedding_rows_are_those_of_the_checkpoint(
    backend: LanguageBackend, language_reference: LlavaForConditionalGeneration
) -> None:
    expected = language_reference.get_input_embeddings().weight.detach().numpy()[IDS]
    assert np.array_equal(backend.embed(IDS), expected)


@pytest.fixture
def opened(loaded: LanguageBackend, bundle: Bundle) -> Opened:
    """Open another backend of the kind that is loaded."""
    return lambda length: OPEN[loaded.name](bundle, threads=1, context_length=length)


def test_a_full_context_refuses_and_goes_on(
    opened: Opened, language_reference: LlavaForConditionalGeneration
) -> None:
    small = opened(50)
    small.prefill([IDS[:48]])
    with pytest.raises(BackendError, match="5 more positions after 48 make 53, and the context"):
        small.prefill([IDS[:5]])
    assert small.position == 48
    expected = reference_logits(language_reference, small.embed(IDS[:50]))
    np.testing.assert_allclose(small.prefill([IDS[48:50]]), expected[-1], atol=TOLERANCE)
    with pytest.raises(BackendError, match="context holds 50"):
        small.decode(5)
    small.close()


@pytest.mark.parametrize("length", [0, 1025])
def test_a_context_the_model_cannot_have(opened: Opened, length: int) -> None:
    with pytest.raises(BackendError, match=f"context_length is {length}: expected 1 to 1024"):
        opened(length)


def test_a_closed_backend_says_so(opened: Opened) -> None:
    backend = opened(None)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="was closed"):
        backend.prefill([IDS])


@pytest.mark.parametrize("loaded", BACKENDS[1:], indirect=True)
def test_every_backend_writes_what_onnx_runtime_writes(
    backend: LanguageBackend, bundle: Bundle
) -> None:
    """Greedy text of three turns about each of 50 pictures."""
    ours = open_ort_backend(bundle, threads=1)
    writer = PromptWriter(bundle)
    for seed in range(50):
        assert _converse(backend, writer, seed) == _converse(ours, writer, seed), f"picture {seed}"


@pytest.mark.llamacpp
def test_llama_cpp_in_float16_differs_by_its_rounding(
    bundle: Bundle, language_checkpoint: Path, tmp_path: Path
) -> None:
    """Random weights have near ties, so float16 is held to the logits and to clear decisions."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python: run `make test-llamacpp`")
    write_gguf(open_checkpoint(language_checkpoint), tmp_path / "half.gguf")
    decoder = LlamaDecoder(
        tmp_path / "half.gguf", EmbeddingTable(bundle), context_length=512, threads=1
    )
    half = LlamaCppBackend(decoder, decoder.start_sequence())
    ours = open_ort_backend(bundle, threads=1)
    for step, part in enumerate([PICTURE, *IDS[:, None]]):
        found, expected = half.prefill([part]), ours.prefill([part])
        np.testing.assert_allclose(found, expected, atol=HALF_TOLERANCE)
        second, first = np.sort(expected)[-2:]
        if first - second > 2 * HALF_TOLERANCE:
            assert found.argmax() == expected.argmax(), f"step {step}"
    half.close()


def _converse(backend: LanguageBackend, writer: PromptWriter, seed: int) -> list[str]:
    picture = np.random.default_rng(seed).normal(size=(16, 64)).astype(np.float32)
    turns: list[Turn] = []
    for question in ("What is this?", "How many?", "And left of it?"):
        turns.append(Turn("user", question, images=0 if turns else 1))
        backend.rewind(0)
        logits = backend.prefill(writer.parts(turns, [picture]))
        answer = Generation(
            backend,
            logits,
            writer.tokenizer,
            stop_token_ids=writer.stop_token_ids,
            options=GenerationOptions(max_tokens=8),
        )
        turns.append(Turn("assistant", "".join(answer)))
    return [turn.text for turn in turns]
