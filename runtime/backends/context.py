"""Keep what the KV cache holds, and compute only the part of a prompt that has changed.

The caller gives the whole prompt every time. The longest common start is kept, the rest is rewound
and prefilled. A second question about a picture therefore costs only its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from runtime.backends import LanguageBackend
from runtime.language.parts import Logits, Part

Key = int | bytes
"""What one position holds: a token id, or the digest of an embedding."""


class Context:
    """A language backend and the record of what its cache holds.

    Attributes:
        backend: nobody else may move its position.
        reused: positions of the last prompt that were in the cache already.
        computed: positions of the last prompt that were not.
    """

    def __init__(self, backend: LanguageBackend) -> None:
        self.backend = backend
        self.reused = 0
        self.computed = 0
        self._held: list[Key] = []

    @property
    def position(self) -> int:
        """Positions filled so far."""
        return self.backend.position

    @property
    def context_length(self) -> int:
        """Positions the cache holds."""
        return self.backend.context_length

    def shared_with(self, prompt: Sequence[Part]) -> int:
        """Return how many positions of a prompt the cache holds already."""
        return _shared(self._held, [key for part in prompt for key in _keys(part)])

    def forget(self) -> None:
        """Hold nothing, so that the next prompt is computed whole."""
        self._held.clear()

    def prefill(self, prompt: Sequence[Part]) -> Logits:
        """Make the cache hold the whole prompt and return the logits after it, float32[V].

        Raises:
            BackendError: a part of the wrong width, or more positions than the context holds; the
                cache then holds what it shares with the prompt.
        """
        wanted = [key for part in prompt for key in _keys(part)]
        # The last position is always computed: its logits are what is asked for.
        shared = min(_shared(self._held, wanted), max(len(wanted) - 1, 0))
        del self._held[shared:]  # first, so that an interruption never leaves more than is there
        self.backend.rewind(shared)
        logits = self.backend.prefill(_without(prompt, shared))
        self._held = wanted
        self.reused, self.computed = shared, len(wanted) - shared
        return logits

    def decode(self, token: int) -> Logits:
        """Append one token and return the logits after it, float32[V]."""
        logits = self.backend.decode(token)
        self._held.append(token)
        return logits


def _keys(part: Part) -> list[Key]:
    if part.ndim == 1:
        return [int(token) for token in part]
    return [blake2b(row, digest_size=16).digest() for row in np.ascontiguousarray(part)]


def _shared(held: list[Key], wanted: list[Key]) -> int:
    for at, (old, new) in enumerate(zip(held, wanted, strict=False)):
        if old != new:
            return at
    return min(len(held), len(wanted))


def _without(prompt: Sequence[Part], count: int) -> list[Part]:
    """Return the parts of a prompt but for its first positions."""
    left: list[Part] = []
    for part in prompt:
        if len(part) > count:
            left.append(part[count:])
        count = max(count - len(part), 0)
    return left
