"""What the language models of this process have in common, whoever computes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from engines.errors import BackendError
from runtime.backends import Capabilities
from runtime.backends.rows import require_rewind
from runtime.language.embeddings import EmbeddingTable
from runtime.language.parts import Embeddings, Logits, Part, TokenIds


class Decoder(Protocol):
    """A loaded model, shared by the conversations with it."""

    @property
    def table(self) -> EmbeddingTable:
        """Text embeddings."""


DecoderT = TypeVar("DecoderT", bound=Decoder)
BackendT = TypeVar("BackendT", bound="DecoderBackend[Any]")


class DecoderBackend(ABC, Generic[DecoderT]):
    """One conversation with a decoder; see `LanguageBackend`.

    Args:
        decoder: what computes it.
        context_length: positions the KV cache holds.
        position: how many of them are filled already.
    """

    name: str
    capabilities: ClassVar[Capabilities]

    def __init__(self, decoder: DecoderT, context_length: int, position: int = 0) -> None:
        self.context_length = context_length
        self.hidden_size = decoder.table.hidden_size
        self._decoder: DecoderT | None = decoder
        self._position = position

    @property
    def position(self) -> int:
        """Positions filled so far."""
        return self._position

    def embed(self, ids: TokenIds) -> Embeddings:
        """Return the embedding rows of token ids, float32[N, D]."""
        return self._open_decoder().table.rows(ids)

    @abstractmethod
    def prefill(self, parts: Sequence[Part]) -> Logits:
        """Append parts and return the logits after the last one, float32[V].

        Raises:
            BackendError: wrong hidden size, more positions than the context holds, or logits that
                are not numbers.
        """

    def decode(self, token: int) -> Logits:
        """Append one token and return the logits after it, float32[V]."""
        return self.prefill([np.array([token], np.int64)])

    def rewind(self, position: int) -> None:
        """Forget everything from ``position`` on."""
        require_rewind(position, self._position)
        self._position = position

    def another(self: BackendT) -> BackendT:
        """Return a second conversation with the same model, whose cache is empty.

        Raises:
            BackendError: conversations are not `Capabilities.apart`.
        """
        if not self.capabilities.apart:
            raise BackendError(
                f"Conversations with {self.name} share one cache, so none can begin with an empty "
                "one. Fork a conversation, or open the backend again."
            )
        return type(self)(self._open_decoder(), self.context_length)

    def close(self) -> None:
        """Free the cache, and the model once no fork uses it; calling it again does nothing."""
        self._decoder = None

    def _open_decoder(self) -> DecoderT:
        if self._decoder is None:
            raise BackendError("This conversation was closed. Open the backend again.")
        return self._decoder
