"""Keep what the KV cache holds, and compute only the part of a prompt that has changed.

The caller gives the whole prompt every time. The longest common start is kept, the rest is rewound
and prefilled. A second question about a picture therefore costs only its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from runtime.backends import LanguageBackend
from runtime.language.parts import Logits, Part, PromptPart, PromptRows, rows_of_prompt

Key = tuple[int | bytes, int, float]
"""What a place of the cache holds: a token id or an embedding's digest; its position and bias."""


class Context:
    """A language backend and the record of what its cache holds.

    Attributes:
        backend: nobody else may move its position.
        reused: rows of the last prompt that were in the cache already.
        computed: rows of the last prompt that were not.
    """

    def __init__(self, backend: LanguageBackend) -> None:
        self.backend = backend
        self.reused = 0
        self.computed = 0
        self._held: list[Key] = []
        self._following = 0  # the position of what comes next

    @property
    def position(self) -> int:
        """Places of the cache that are filled so far."""
        return self.backend.position

    @property
    def context_length(self) -> int:
        """Places that can be filled: those of the cache, or as the trained positions allow."""
        left = self.backend.most_positions - self._following
        return min(self.backend.context_length, self.position + left)

    def shared_with(self, prompt: Sequence[PromptPart]) -> int:
        """Return how many rows of a prompt the cache holds already."""
        return _shared(self._held, _keys(rows_of_prompt(prompt)))

    def forget(self) -> None:
        """Hold nothing, so that the next prompt is computed whole."""
        self._held.clear()

    def prefill(self, prompt: Sequence[PromptPart]) -> Logits:
        """Make the cache hold the whole prompt and return the logits after it, float32[V].

        Raises:
            BackendError: a part of the wrong width, more rows than the context holds, or positions
                that the backend cannot take; the cache then holds what it shares with the prompt.
        """
        rows = rows_of_prompt(prompt)
        wanted = _keys(rows)
        # The last position is always computed: its logits are what is asked for.
        shared = min(_shared(self._held, wanted), max(len(wanted) - 1, 0))
        del self._held[shared:]  # first, so that an interruption never leaves more than is there
        self.backend.rewind(shared)
        parts = _without(rows.parts, shared)
        logits = self.backend.prefill(parts, rows.positions[shared:], rows.bias[shared:])
        self._held, self._following = wanted, rows.following
        self.reused, self.computed = shared, len(wanted) - shared
        return logits

    def decode(self, token: int) -> Logits:
        """Append one token and return the logits after it, float32[V]."""
        at = np.array([self._following])
        logits = self.backend.prefill([np.array([token], np.int64)], at)
        self._held.append((token, self._following, 0.0))
        self._following += 1
        return logits


def _keys(rows: PromptRows) -> list[Key]:
    held: list[int | bytes] = []
    for part in rows.parts:
        if part.ndim == 1:
            held += [int(token) for token in part]
        else:
            held += [blake2b(row, digest_size=16).digest() for row in np.ascontiguousarray(part)]
    return list(zip(held, rows.positions.tolist(), rows.bias.tolist(), strict=True))


def _shared(held: list[Key], wanted: list[Key]) -> int:
    for at, (old, new) in enumerate(zip(held, wanted, strict=False)):
        if old != new:
            return at
    return min(len(held), len(wanted))


def _without(prompt: Sequence[Part], count: int) -> list[Part]:
    """Return the parts of a prompt but for its first rows."""
    left: list[Part] = []
    for part in prompt:
        if len(part) > count:
            left.append(part[count:])
        count = max(count - len(part), 0)
    return left
