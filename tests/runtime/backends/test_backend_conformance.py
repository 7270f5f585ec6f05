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
from runtime.backends.context import Context
from runtime.backends.llama_decoder import LlamaDecoder
from runtime.backends.llamacpp import LlamaCppBackend, open_llamacpp_backend
from runtime.backends.openvino_backend import open_openvino_backend
from runtime.backends.ort import open_ort_backend
from runtime.language.embeddings import EmbeddingTable
from runtime.language.generate import Generation, GenerationOptions
from runtime.language.parts import Bias, Embeddings, Positions
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


def reference_logits(
    model: LlavaForConditionalGeneration,
    rows: Embeddings,
    positions: Positions | None = None,
    bias: Bias | None = None,
) -> np.ndarray:
    at = None if positions is None else torch.from_numpy(positions)[None]
    mask = None
    if bias is not None:
        later = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
        mask = torch.from_numpy(bias).expand(1, 1, len(rows), -1).masked_fill(later, -torch.inf)
    with torch.no_grad():
        given = torch.from_numpy(rows)[None]
        output = model(inputs_embeds=given, position_ids=at, attention_mask=mask)
    logits: np.ndarray = output.logits[0].numpy()
    return logits


@pytest.fixture
def sparse(backend: LanguageBackend) -> LanguageBackend:
    """A backend that takes positions; one that does not says so and stays as it was."""
    if not backend.capabilities.positions:
        with pytest.raises(BackendError, match="takes consecutive positions only"):
            backend.prefill([IDS[:3]], np.array([0, 1, 5]))
        assert backend.position == 0
        pytest.skip(f"{backend.name} takes consecutive positions only")
    return backend


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
        backend.prefill([np.array([7])]),
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


PLACES = np.array([3, 3, 4, 9, 20, 21, 7, 40, 47, 48, 50, 51, 60, 61, 62, 30])
"""Of the picture's tokens: merged ones stand before others, and two may share a place."""
SPREAD = np.concatenate([np.arange(5), 5 + PLACES, 5 + 64 + np.arange(55)])


def test_sparse_positions_give_the_logits_of_transformers(
    sparse: LanguageBackend, language_reference: LlavaForConditionalGeneration
) -> None:
    """A prompt with a picture, a follow-up turn, and tokens one by one."""
    rows = np.concatenate([sparse.embed(IDS[:5]), PICTURE, sparse.embed(IDS[5:])])
    expected = reference_logits(language_reference, rows, SPREAD)
    first = sparse.prefill([IDS[:5], PICTURE, IDS[5:20]], SPREAD[:36])
    second = sparse.prefill([IDS[20:50]], SPREAD[36:66])
    np.testing.assert_allclose(first, expected[35], atol=TOLERANCE)
    np.testing.assert_allclose(second, expected[65], atol=TOLERANCE)
    for at in range(66, 76):
        found = sparse.prefill([IDS[[at - 16]]])
        np.testing.assert_allclose(found, expected[at], atol=TOLERANCE)
    compact = reference_logits(language_reference, rows)
    assert np.abs(expected[-1] - compact[-1]).max() > 100 * TOLERANCE


WEIGHTS = np.concatenate([np.zeros(5), np.log(1 + np.arange(16)), np.zeros(55)]).astype("f4")


@pytest.mark.parametrize("positions", [None, SPREAD], ids=["compact", "original"])
def test_merged_tokens_count_for_more(
    backend: LanguageBackend,
    language_reference: LlavaForConditionalGeneration,
    positions: Positions | None,
) -> None:
    """In the prompt, for later turns and tokens, behind a rewind and in a fork."""
    if not backend.capabilities.bias:
        with pytest.raises(BackendError, match="all visual tokens count the same"):
            backend.prefill([PICTURE], None, np.log(1 + np.arange(16)).astype(np.float32))
        assert backend.position == 0
        return
    rows = np.concatenate([backend.embed(IDS[:5]), PICTURE, backend.embed(IDS[5:])])
    expected = reference_logits(language_reference, rows, positions, WEIGHTS)
    part = (lambda end: None) if positions is None else (lambda end: positions[:end])
    first = backend.prefill([IDS[:5], PICTURE, IDS[5:20]], part(36), WEIGHTS[:36])
    np.testing.assert_allclose(first, expected[35], atol=TOLERANCE)
    backend.prefill([IDS[40:]], None, np.full(20, 3, np.float32))
    backend.rewind(36)
    fork = backend.fork()
    for at in range(36, 50):
        found = backend.prefill([IDS[[at - 16]]])
        np.testing.assert_allclose(found, expected[at], atol=TOLERANCE)
    np.testing.assert_allclose(fork.prefill([IDS[20:50]]), expected[65], atol=TOLERANCE)
    fork.close()
    plain = reference_logits(language_reference, rows, positions)
    assert np.abs(expected[-1] - plain[-1]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("bias", [np.zeros(2, "f4"), np.zeros(3), np.full(3, np.nan, "f4")])
def test_a_bias_that_cannot_be_is_refused(backend: LanguageBackend, bias: Bias) -> None:
    with pytest.raises(BackendError, match="expected a finite float32 for each"):
        backend.prefill([IDS[:3]], None, bias)
    assert backend.position == 0


def test_a_picture_may_begin_the_prompt(
    sparse: LanguageBackend, language_reference: LlavaForConditionalGeneration
) -> None:
    expected = reference_logits(language_reference, PICTURE, PLACES)
    np.testing.assert_allclose(sparse.prefill([PICTURE], PLACES), expected[-1], atol=TOLERANCE)


@pytest.mark.parametrize("kept", [5, 12, 21])
def test_rewind_and_fork_keep_sparse_positions(
    sparse: LanguageBackend, language_reference: LlavaForConditionalGeneration, kept: int
) -> None:
    sparse.prefill([IDS[:5], PICTURE, IDS[5:]], SPREAD)
    sparse.rewind(kept)
    fork = sparse.fork()
    rows = np.concatenate([sparse.embed(IDS[:5]), PICTURE, sparse.embed(IDS[20:30])])
    rows = np.concatenate([rows[:kept], rows[-10:]])
    at = np.concatenate([SPREAD[:kept], 200 + np.arange(10)])
    expected = reference_logits(language_reference, rows, at)[-1]
    np.testing.assert_allclose(sparse.prefill([IDS[20:30]], at[kept:]), expected, atol=TOLERANCE)
    sparse.rewind(0)
    np.testing.assert_allclose(fork.prefill([IDS[20:30]], at[kept:]), expected, atol=TOLERANCE)
    following = np.concatenate([at, [210]])
    rows = np.concatenate([rows, fork.embed(np.array([7]))])
    expected = reference_logits(language_reference, rows, following)[-1]
    np.testing.assert_allclose(fork.prefill([np.array([7])]), expected, atol=TOLERANCE)
    fork.close()


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (np.array([0, 1]), r"positions \[2\] for 3 rows"),
        (np.array([0, 1, 1024]), "to 1024, and the language model was trained for 0 to 1023"),
        (np.array([-1, 0, 1]), "from position -1"),
    ],
)
def test_positions_that_cannot_be_are_refused(
    backend: LanguageBackend, positions: Positions, message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        backend.prefill([IDS[:3]], positions)
    assert backend.position == 0


@pytest.mark.llamacpp
def test_llama_cpp_itself_refuses_positions_with_gaps(bundle: Bundle) -> None:
    """Once a release takes them, the backend can say that it does."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python: run `make test-llamacpp`")
    backend = open_llamacpp_backend(bundle, threads=1)
    assert backend._decoder is not None
    rows = backend.embed(IDS[:4])
    backend._decoder.append(rows[:2], 0, 0)
    with pytest.raises(BackendError, match=r"status -1: .*it is required that the sequence"):
        backend._decoder.append(rows[2:], 0, 5)
    backend.close()


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
        small.prefill([np.array([5])])
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
        context = Context(backend)  # holds nothing, so all is computed again
        logits = context.prefill(writer.parts(turns, [picture]))
        answer = Generation(
            context,
            logits,
            writer.tokenizer,
            stop_token_ids=writer.stop_token_ids,
            options=GenerationOptions(max_tokens=8),
        )
        turns.append(Turn("assistant", "".join(answer)))
    return [turn.text for turn in turns]
