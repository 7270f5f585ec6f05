"""The door to a language model: parts in, logits out, and a position that can be rewound.

A part is a run of token ids or a run of ready embeddings (the visual tokens). Text rows always come
from the bundle's own embedding table, so every backend sees the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]
Embeddings = NDArray[np.float32]
Logits = NDArray[np.float32]
Part = TokenIds | Embeddings
"""int64[N] token ids, or float32[N, D] embeddings."""


class LanguageBackend(Protocol):
    """One conversation with a language model; the KV cache is its own.

    Attributes:
        name: ``"ort"``, ``"llamacpp"``, ...
        context_length: positions the KV cache holds.
        hidden_size: D of the embeddings it takes.
    """

    name: str
    context_length: int
    hidden_size: int

    @property
    def position(self) -> int:
        """Positions filled so far."""

    def embed(self, ids: TokenIds) -> Embeddings:
        """Return the embedding rows of token ids, float32[N, D]."""

    def prefill(self, parts: Sequence[Part]) -> Logits:
        """Append parts and return the logits after the last one, float32[V].

        Raises:
            BackendError: wrong hidden size, or more positions than the context holds.
        """

    def decode(self, token: int) -> Logits:
        """Append one token and return the logits after it, float32[V]."""

    def rewind(self, position: int) -> None:
        """Forget everything from ``position`` on."""

    def fork(self) -> LanguageBackend:
        """Return a second conversation that starts with a copy of this one's cache."""

    def close(self) -> None:
        """Free the model; calling it again does nothing."""
