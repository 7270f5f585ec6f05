"""The interfaces of a language model that runs in this process, and of one that a server runs.

In this process: parts in, logits out, and a position that can be rewound. A part is a run of token
ids or of ready embeddings (the visual tokens). Text rows come from the bundle's own embedding
table, so every backend sees the same numbers. On a server: a conversation in, text out.
`local_text` gives a model of this process the interface of a server.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from runtime.language.generate import Finish, GenerationOptions
from runtime.language.parts import Embeddings, Logits, Part, TokenIds
from runtime.language.prompt import Turn


@dataclass(frozen=True)
class Capabilities:
    """What a caller may ask of a backend.

    Attributes:
        logits: it hands out logits, so any way of choosing tokens works with it.
        rewind: a follow-up question costs only its own tokens; a server recomputes the conversation
            or keeps a prefix cache of its own.
        fork: a conversation can go two ways.
        apart: conversations with one model have caches of their own, so several go on at once.
    """

    logits: bool
    rewind: bool
    fork: bool
    apart: bool


IN_PROCESS = Capabilities(logits=True, rewind=True, fork=True, apart=True)


class LanguageBackend(Protocol):
    """One conversation with a language model; the KV cache is its own.

    Attributes:
        name: ``"ort"``, ``"llamacpp"``, ...
        capabilities: what may be asked of it.
        context_length: positions the KV cache holds.
        hidden_size: D of the embeddings it takes.
    """

    name: str
    capabilities: ClassVar[Capabilities]
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

    def another(self) -> LanguageBackend:
        """Return a second conversation with the same model, whose cache is empty.

        Raises:
            BackendError: conversations are not `Capabilities.apart`.
        """

    def close(self) -> None:
        """Free the model; calling it again does nothing."""


class TextGeneration(Protocol):
    """One answer in the making: iterate over it for its pieces, close the iterator to cancel it."""

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the answer so far, without the stop token."""

    @property
    def text(self) -> str:
        """The answer so far."""

    @property
    def finish(self) -> Finish | None:
        """Why it ended; None while it has not."""

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt."""

    @property
    def reused_tokens(self) -> int | None:
        """How many of them were in the KV cache already; None where it is unknown."""

    def prefill(self) -> None:
        """Wait until the prompt has been read; iterating does, too."""

    def __iter__(self) -> Generator[str]:
        """Yield the answer's pieces as they come."""


class TextBackend(Protocol):
    """A language model that takes conversations and writes text; every backend can be one.

    Attributes:
        name: ``"ort"``, ``"vllm"``, ...
        context_length: positions of prompt and answer together.
    """

    name: str
    context_length: int

    def generate(
        self, turns: Sequence[Turn], pictures: Sequence[Embeddings], options: GenerationOptions
    ) -> TextGeneration:
        """Start an answer to a conversation.

        Args:
            turns: the conversation, ending with a question.
            pictures: float32[N, D] of each picture, in the order of the turns.
            options: how the answer is written.

        Raises:
            BackendError: a picture that must not be sent, or more positions than the context holds.
            OptionError: a conversation or a form of answer that it cannot take.
        """

    def close(self) -> None:
        """Free the model, or let go of the server; calling it again does nothing."""
