"""Which KV cache a question goes to."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest

from engines.bundle import Bundle
from runtime.backends.local_text import LocalText
from runtime.backends.opening import open_backend
from runtime.backends.ort import open_ort_backend
from runtime.language.prompt import PromptWriter
from runtime.server.caches import Caches


def prompt(*ids: int) -> list[np.ndarray]:
    return [np.array(ids, np.int64)]


def read(caches: Caches, *ids: int) -> tuple[LocalText, int]:
    """Lend a cache, let it read a prompt, and return it with what it had of it."""
    with caches.lend(prompt(*ids)) as text:
        assert isinstance(text, LocalText)
        text.context.prefill(prompt(*ids))
        return text, text.context.reused


def test_a_conversation_finds_its_cache_again(language_bundle: Bundle) -> None:
    writer = PromptWriter(language_bundle)
    caches = Caches(LocalText(open_ort_backend(language_bundle, threads=1), writer), writer, 2)
    first, _ = read(caches, 5, 6, 7, 8)
    second, reused = read(caches, 9, 6, 7, 8)
    assert (first is not second, reused, len(caches)) == (True, 0, 2)
    again, reused = read(caches, 5, 6, 7, 8, 10, 11)
    assert (again is first, reused) == (True, 4)
    again, reused = read(caches, 9, 6, 7, 8, 12)
    assert (again is second, reused) == (True, 4)
    assert caches.evicted == 0
    third, reused = read(caches, 20, 21)  # nobody knows it: the longest unused one goes
    assert (third is first, reused, caches.evicted, len(caches)) == (True, 0, 1, 2)
    caches.close()


@pytest.mark.parametrize("name", ["ort", "openvino"])
def test_those_lent_at_once_are_different_ones(language_bundle: Bundle, name: str) -> None:
    writer = PromptWriter(language_bundle)
    caches = Caches(LocalText(open_backend(language_bundle, name, threads=1), writer), writer, 3)
    with ExitStack() as stack:
        lent = [stack.enter_context(caches.lend(prompt(5, 6))) for _ in range(3)]
        assert len({id(text) for text in lent}) == 3
    caches.close()
