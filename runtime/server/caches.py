"""Choose the KV cache that goes on with a conversation.

Clients send the whole conversation with every question. The cache that holds the longest start of
it computes the rest only; a conversation that none knows gets a new cache, or the one that was not
used for the longest time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from runtime.backends import LanguageBackend, TextBackend
from runtime.backends.local_text import LocalText
from runtime.language.parts import PromptPart
from runtime.language.prompt import PromptWriter

_LARGEST_LOSS = 0.5
"""Share of what a cache holds that another conversation may overwrite while there is room for
more."""


class Caches:
    """The language models that answers are written with.

    A model on a server keeps caches of its own, and llama.cpp's conversations share one: each is
    lent as it is.

    Attributes:
        most: caches there may be.
        evicted: how many conversations lost theirs to another one.
    """

    def __init__(self, language: TextBackend, writer: PromptWriter, most: int) -> None:
        self.most = most
        self.evicted = 0
        self._first = language
        self._writer = writer
        self._idle: list[LocalText] = []  # the longest unused first
        self._count = 1
        self._lock = threading.Lock()
        self._backend: LanguageBackend | None = None
        if isinstance(language, LocalText):
            self._idle.append(language)
            if language.context.backend.capabilities.apart:
                self._backend = language.context.backend

    def __len__(self) -> int:
        """Return how many there are."""
        return self._count

    @contextmanager
    def lend(self, prompt: Sequence[PromptPart], fresh: bool = False) -> Iterator[TextBackend]:
        """Lend a language model to one answer.

        Args:
            prompt: what it will read; there must be no more borrowers than `most`.
            fresh: as if none held anything of it; what a server caches is its own affair.
        """
        if not isinstance(self._first, LocalText):
            yield self._first
            return
        text = self._take([] if fresh else prompt)
        if fresh:
            text.context.forget()
        try:
            yield text
        finally:
            with self._lock:
                self._idle.append(text)

    def _take(self, prompt: Sequence[PromptPart]) -> LocalText:
        with self._lock:
            known = [text.context.shared_with(prompt) for text in self._idle]
            best = max(range(len(known)), key=lambda at: known[at], default=None)
            if best is not None and _goes_on(self._idle[best], known[best]):
                return self._idle.pop(best)
            if self._backend is not None and self._count < self.most:
                self._count += 1
                return LocalText(self._backend.another(), self._writer)
            chosen = best if best is not None and known[best] else 0
            self.evicted += 1
            return self._idle.pop(chosen)

    def close(self) -> None:
        """Free them."""
        with self._lock:
            for text in self._idle:
                text.close()
        self._first.close()


def _goes_on(text: LocalText, shared: int) -> bool:
    """Return whether a prompt goes on with what a cache holds, or the cache is empty."""
    return shared >= (1 - _LARGEST_LOSS) * text.context.position
