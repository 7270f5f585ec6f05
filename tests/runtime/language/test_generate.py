"""The decoding loop: against transformers' generate, and against a scripted model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import LlavaForConditionalGeneration

from engines.bundle import Bundle
from engines.errors import OptionError
from runtime.backends.context import Context
from runtime.backends.ort import open_ort_backend
from runtime.language.generate import Generation, GenerationOptions
from runtime.language.parts import Logits
from runtime.language.sampling import Sampling
from tests.tiny_language import tiny_tokenizer

STOP = 2


class ScriptedBackend:
    """A language model that says what it was told to say."""

    name, hidden_size = "scripted", 4

    def __init__(self, script: Sequence[int], context_length: int = 1000) -> None:
        self.script = [*script, STOP]
        self.context_length = context_length
        self.position = 0

    def logits(self) -> Logits:
        logits = np.zeros(400, np.float32)
        logits[self.script[self.position]] = 1
        return logits

    def decode(self, token: int) -> Logits:
        assert token == self.script[self.position]
        self.position += 1
        return self.logits()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer().backend_tokenizer


def write(
    tokenizer: Tokenizer, script: Sequence[int], context_length: int = 1000, **options: object
) -> tuple[Generation, list[str]]:
    backend = ScriptedBackend(script, context_length)
    generation = Generation(
        backend,
        backend.logits(),
        tokenizer,
        stop_token_ids=(STOP,),
        options=GenerationOptions(**options),
    )
    return generation, list(generation)


def test_greedy_answer_equals_transformers(
    language_bundle: Bundle, language_reference: LlavaForConditionalGeneration, tokenizer: Tokenizer
) -> None:
    backend = open_ort_backend(language_bundle, threads=1)
    for seed in range(5):
        ids = np.random.default_rng(seed).integers(5, 300, 30)
        generated = language_reference.generate(
            input_ids=torch.from_numpy(ids[None]),
            attention_mask=torch.ones((1, 30), dtype=torch.int64),
            max_new_tokens=40,
            do_sample=False,
        )[0, 30:].tolist()
        context = Context(backend)
        answer = Generation(
            context,
            context.prefill([ids]),
            tokenizer,
            stop_token_ids=(STOP,),
            options=GenerationOptions(max_tokens=40),
        )
        text = "".join(answer)
        assert answer.token_ids == [token for token in generated if token != STOP]
        assert text == tokenizer.decode(generated)
        assert answer.finish == ("stop_token" if generated[-1] == STOP else "max_tokens")


@given(text=st.text(max_size=40))
def test_pieces_are_whole_characters_and_join_to_the_text(text: str) -> None:
    tokenizer = tiny_tokenizer_once()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    generation, pieces = write(tokenizer, ids)
    assert "".join(pieces) == generation.text == tokenizer.decode(ids)
    assert generation.finish == "stop_token"
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


_tokenizers: list[Tokenizer] = []


def tiny_tokenizer_once() -> Tokenizer:
    if not _tokenizers:
        _tokenizers.append(tiny_tokenizer().backend_tokenizer)
    return _tokenizers[0]


@given(ids=st.lists(st.integers(3, 299).filter(lambda token: token != STOP), max_size=30))
def test_any_tokens_join_to_what_the_tokenizer_decodes(ids: list[int]) -> None:
    tokenizer = tiny_tokenizer_once()
    generation, pieces = write(tokenizer, ids)
    assert "".join(pieces) == generation.text == tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a 日 b", add_special_tokens=False).ids
    assert len(ids) > 5
    _, pieces = write(tokenizer, ids)
    assert "日" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_is_never_finished_shows_as_such(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 日", add_special_tokens=False).ids[:-1]
    generation, _ = write(tokenizer, ids)
    assert generation.text == tokenizer.decode(ids)
    assert generation.text.startswith("ok ") and generation.text.endswith("\ufffd")


@pytest.mark.parametrize("stop", ["door", "left,", "e", "before the door"])
def test_stop_strings_end_the_answer_and_are_not_shown(tokenizer: Tokenizer, stop: str) -> None:
    text = "The robot turns left, then right; it stops before the door."
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    generation, pieces = write(tokenizer, ids, stop=(stop, "never said"))
    assert "".join(pieces) == generation.text == text[: text.index(stop)]
    assert generation.finish == "stop_string"


def test_what_looked_like_a_stop_string_is_shown_in_the_end(tokenizer: Tokenizer) -> None:
    text = "it stops before the d"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    generation, pieces = write(tokenizer, ids, stop=("the door",))
    assert "".join(pieces) == text
    assert generation.finish == "stop_token"


def test_max_tokens(tokenizer: Tokenizer) -> None:
    generation, _ = write(tokenizer, [60, 61, 62, 63], max_tokens=2)
    assert generation.token_ids == [60, 61]
    assert generation.finish == "max_tokens"


def test_a_full_context_ends_the_answer(tokenizer: Tokenizer) -> None:
    generation, _ = write(tokenizer, [60, 61, 62, 63, 64], context_length=3)
    assert generation.token_ids == [60, 61, 62, 63]
    assert generation.finish == "context_full"


def test_bad_options_are_refused() -> None:
    with pytest.raises(OptionError, match="max_tokens is 0"):
        GenerationOptions(max_tokens=0)
    with pytest.raises(OptionError, match="stop string is empty"):
        GenerationOptions(stop=("x", ""))


def test_sampling_is_seeded(language_bundle: Bundle, tokenizer: Tokenizer) -> None:
    backend = open_ort_backend(language_bundle, threads=1)

    def answer(seed: int) -> list[int]:
        context = Context(backend)
        generation = Generation(
            context,
            context.prefill([np.arange(20, 40)]),
            tokenizer,
            stop_token_ids=(STOP,),
            options=GenerationOptions(
                max_tokens=15, sampling=Sampling(temperature=1.5, top_p=0.9, seed=seed)
            ),
        )
        list(generation)
        return generation.token_ids

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


@pytest.mark.parametrize(
    ("given", "said", "limit"),
    [(None, None, 256), (None, 20, 20), (None, 10**6, 2048), (7, 20, 7), (5000, 20, 5000)],
)
def test_the_longest_answer_is_the_users_or_the_checkpoints(
    given: int | None, said: int | None, limit: int
) -> None:
    assert GenerationOptions(max_tokens=given).limited(said).max_tokens == limit


def test_a_longest_answer_is_known_without_a_checkpoint() -> None:
    assert GenerationOptions().most_tokens == 256
    assert GenerationOptions(max_tokens=9).most_tokens == 9
