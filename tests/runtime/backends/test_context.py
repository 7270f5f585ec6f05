"""What the cache holds is used again: counted, and equal to computing everything."""

from __future__ import annotations

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.errors import BackendError
from runtime.backends.context import Context
from runtime.backends.ort import open_ort_backend
from runtime.language.parts import Part

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
