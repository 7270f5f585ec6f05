"""What the cache holds is used again: counted, and equal to computing everything."""

from __future__ import annotations

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.errors import BackendError
from runtime.backends.context import Context
from runtime.backends.openvino_backend import open_openvino_backend
from runtime.backends.ort import open_ort_backend
from runtime.language.parts import Part, PlacedTokens, PromptPart

RANDOM = np.random.default_rng(0)
SYSTEM, QUESTION, OTHER = (RANDOM.integers(5, 300, size) for size in (12, 9, 15))
PICTURE, FRAME = (RANDOM.normal(size=(16, 64)).astype(np.float32) for _ in range(2))


@pytest.fixture(scope="module")
def context(language_bundle: Bundle) -> Context:
    return Context(open_ort_backend(language_bundle, threads=1, context_length=200))


@pytest.mark.parametrize(
    ("before", "now", "reused"),
    [
        ([], [SYSTEM, PICTURE, QUESTION], 0),
        ([SYSTEM, PICTURE, QUESTION], [SYSTEM, PICTURE, OTHER], 12 + 16),
        ([SYSTEM, PICTURE, QUESTION], [SYSTEM, FRAME, QUESTION], 12),
        ([SYSTEM, PICTURE, QUESTION], [SYSTEM, PICTURE, QUESTION], 12 + 16 + 9 - 1),
        ([SYSTEM, PICTURE, QUESTION], [SYSTEM, PICTURE], 12 + 16 - 1),
        ([SYSTEM, PICTURE], [SYSTEM, PICTURE, QUESTION, FRAME], 12 + 16),
        ([SYSTEM, PICTURE, QUESTION], [OTHER], 0),
        ([SYSTEM[:6], SYSTEM[6:], PICTURE[:5]], [SYSTEM, PICTURE, QUESTION], 12 + 5),
    ],
    ids=["empty", "question", "frame", "same", "shorter", "longer", "all new", "cut elsewhere"],
)
def test_only_what_changed_is_computed(
    context: Context, language_bundle: Bundle, before: list[Part], now: list[Part], reused: int
) -> None:
    if before:
        context.prefill(before)
    else:
        context = Context(open_ort_backend(language_bundle, threads=1, context_length=200))
    logits = context.prefill(now)
    total = sum(len(part) for part in now)
    assert (context.reused, context.computed) == (reused, total - reused)
    assert context.position == total
    fresh = context.backend.fork()
    fresh.rewind(0)
    np.testing.assert_allclose(logits, fresh.prefill(now), atol=2e-5)


def test_decoded_tokens_are_held_too(context: Context) -> None:
    context.prefill([SYSTEM, PICTURE])
    for token in (7, 8, 9):
        context.decode(token)
    context.prefill([SYSTEM, PICTURE, np.array([7, 8, 9]), QUESTION])
    assert context.reused == 12 + 16 + 3


def test_a_prompt_that_does_not_fit_leaves_the_record_right(context: Context) -> None:
    context.prefill([SYSTEM, PICTURE, QUESTION])
    with pytest.raises(BackendError, match="context holds 200"):
        context.prefill([SYSTEM, np.tile(OTHER, 20)])
    logits = context.prefill([SYSTEM, PICTURE, QUESTION])
    assert context.reused == 12
    fresh = context.backend.fork()
    fresh.rewind(0)
    np.testing.assert_allclose(logits, fresh.prefill([SYSTEM, PICTURE, QUESTION]), atol=2e-5)


PLACES = np.array([0, 2, 3, 9, 11, 12, 30, 31, 32, 33, 50, 51, 52, 60, 40, 41])
EQUAL, BIAS = np.zeros(16, np.float32), np.linspace(0, 5, 16, dtype=np.float32)
PLACED, ELSEWHERE = (PlacedTokens(PICTURE, places, 64, EQUAL) for places in (PLACES, PLACES + 1))
WEIGHED = PlacedTokens(PICTURE, PLACES, 64, BIAS)


@pytest.mark.parametrize(
    ("before", "now", "reused"),
    [
        ([SYSTEM, PLACED, QUESTION], [SYSTEM, PLACED, OTHER], 12 + 16),
        ([SYSTEM, PLACED, QUESTION], [SYSTEM, PLACED, QUESTION, PLACED, OTHER], 12 + 16 + 9),
        ([SYSTEM, PLACED, QUESTION], [SYSTEM, ELSEWHERE, QUESTION], 12),
        ([SYSTEM, PICTURE, QUESTION], [SYSTEM, PLACED, QUESTION], 12 + 1),
        ([SYSTEM, PLACED, QUESTION], [SYSTEM, PICTURE, QUESTION], 12 + 1),
        ([SYSTEM, PLACED, QUESTION], [PLACED, QUESTION], 0),
        ([SYSTEM, WEIGHED, QUESTION], [SYSTEM, WEIGHED, OTHER], 12 + 16),
        ([SYSTEM, PLACED, QUESTION], [SYSTEM, WEIGHED, QUESTION], 12 + 1),
    ],
    ids=[
        "question",
        "second picture",
        "other places",
        "compact first",
        "compact then",
        "moved",
        "weighed",
        "weighed then",
    ],
)
def test_what_is_held_at_another_position_is_computed_again(
    language_bundle: Bundle, before: list[PromptPart], now: list[PromptPart], reused: int
) -> None:
    for opened in (open_ort_backend, open_openvino_backend):
        context = Context(opened(language_bundle, threads=1, context_length=200))
        context.prefill(before)
        context.decode(7)
        logits = context.prefill(now)
        assert context.reused == reused
        fresh = Context(context.backend.another())
        np.testing.assert_allclose(logits, fresh.prefill(now), atol=2e-5)
        np.testing.assert_allclose(context.decode(9), fresh.decode(9), atol=2e-5)


def test_text_goes_on_behind_all_of_a_picture(language_bundle: Bundle) -> None:
    """Also where the prompt ends with the picture, and the cache tells what is left of 1,024."""
    context = Context(open_ort_backend(language_bundle, threads=1))
    context.prefill([SYSTEM, PLACED])
    apart = context.decode(7)
    whole = Context(context.backend.another())
    np.testing.assert_allclose(apart, whole.prefill([SYSTEM, PLACED, np.array([7])]), atol=2e-5)
    assert context.position == 12 + 16 + 1
    assert context.context_length - context.position == 1024 - 12 - 64 - 1


def test_all_tokens_in_their_places_are_what_they_are_without(language_bundle: Bundle) -> None:
    context = Context(open_ort_backend(language_bundle, threads=1))
    whole = PlacedTokens(PICTURE, np.arange(16), 16, EQUAL)
    placed = context.prefill([SYSTEM, whole, QUESTION])
    context.forget()
    assert np.array_equal(context.prefill([SYSTEM, PICTURE, QUESTION]), placed)
