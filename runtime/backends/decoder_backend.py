"""What the language models of this process have in common, whoever computes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from engines.errors import BackendError
from runtime.backends import Capabilities
from runtime.backends.rows import require_bias, require_positions, require_rewind, require_room
from runtime.language.embeddings import EmbeddingTable
from runtime.language.parts import Bias, Embeddings, Logits, Part, Positions, TokenIds


class Decoder(Protocol):
    """A loaded model, shared by the conversations with it."""

    @property
    def table(self) -> EmbeddingTable:
        """Text embeddings."""

    @property
    def most_positions(self) -> int:
        """Positions the model was trained for."""


DecoderT = TypeVar("DecoderT", bound=Decoder)
BackendT = TypeVar("BackendT", bound="DecoderBackend[Any]")


class DecoderBackend(ABC, Generic[DecoderT]):
    """One conversation with a decoder; see `LanguageBackend`.

    Args:
        decoder: what computes it.
        context_length: places the KV cache has.
    """

    name: str
    capabilities: Capabilities

    def __init__(self, decoder: DecoderT, context_length: int) -> None:
        self.context_length = context_length
        self.most_positions = decoder.most_positions
        self.hidden_size = decoder.table.hidden_size
        self._decoder: DecoderT | None = decoder
        # Of what the cache holds; never written to.
        self._positions: Positions = np.zeros(0, np.int64)
        self._bias: Bias = np.zeros(0, np.float32)

    @property
    def position(self) -> int:
        """Places of the KV cache that are filled so far."""
        return len(self._positions)

    def embed(self, ids: TokenIds) -> Embeddings:
        """Return the embedding rows of token ids, float32[N, D]."""
        return self._open_decoder().table.rows(ids)

    @abstractmethod
    def prefill(
        self, parts: Sequence[Part], positions: Positions | None = None, bias: Bias | None = None
    ) -> Logits:
        """Append parts and return the logits after the last one, float32[V].

        Args:
            parts: token ids and embeddings.
            positions: int64[N], where all of their rows stand; left out, one after the other
                behind the last.
            bias: float32[N], added to every score of attention to a row; left out, zeros.

        Raises:
            BackendError: wrong hidden size, more rows than the context holds, positions or a bias
                that the model cannot take, or logits that are not numbers.
        """

    def rewind(self, position: int) -> None:
        """Forget everything from a place of the cache on."""
        require_rewind(position, self.position)
        self._positions, self._bias = self._positions[:position], self._bias[:position]

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

    def _standing_of(
        self, count: int, positions: Positions | None, bias: Bias | None
    ) -> tuple[Positions, Bias]:
        """Return where the next rows stand, int64[count], and their bias, float32[count].

        Raises:
            BackendError: there is no room for them, or the model cannot take what is given.
        """
        require_room(self.position, count, self.context_length)
        following = int(self._positions[-1]) + 1 if len(self._positions) else 0
        if positions is None:
            positions = np.arange(following, following + count)
        consecutive = None if self.capabilities.positions else self.name
        equal = None if self.capabilities.bias else self.name
        return (
            require_positions(positions, count, following, self.most_positions, consecutive),
            require_bias(np.zeros(count, np.float32) if bias is None else bias, count, equal),
        )

    def _open_decoder(self) -> DecoderT:
        if self._decoder is None:
            raise BackendError("This conversation was closed. Open the backend again.")
        return self._decoder
