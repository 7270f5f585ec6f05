"""The interfaces of a language model that runs in this process, and of one that a server runs.

In this process: parts in, logits out, and a cache that can be rewound. A part is a run of token
ids or of ready embeddings (the visual tokens). Text rows come from the bundle's own embedding
table, so every backend sees the same numbers. On a server: a conversation in, text out.
`local_text` gives a model of this process the interface of a server.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.language.generate import Finish, GenerationOptions
from runtime.language.parts import Bias, Embeddings, Logits, Part, Picture, Positions, TokenIds
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
        positions: rows may stand at positions that leave some out, as visual tokens do that keep
            those they have among all of a picture's.
        bias: rows may count for more than one, as merged visual tokens do.
    """

    logits: bool
    rewind: bool
    fork: bool
    apart: bool
    positions: bool
    bias: bool


IN_PROCESS = Capabilities(
    logits=True, rewind=True, fork=True, apart=True, positions=True, bias=True
)


class LanguageBackend(Protocol):
    """One conversation with a language model; the KV cache is its own.

    Attributes:
        name: ``"ort"``, ``"llamacpp"``, ...
        capabilities: what may be asked of it.
        context_length: places the KV cache has.
        most_positions: positions the language model was trained for.
        hidden_size: D of the embeddings it takes.
    """

    name: str
    capabilities: Capabilities
    context_length: int
    most_positions: int
    hidden_size: int

    @property
    def position(self) -> int:
        """Places of the KV cache that are filled so far."""

    def embed(self, ids: TokenIds) -> Embeddings:
        """Return the embedding rows of token ids, float32[N, D]."""

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
            BackendError: wrong hidden size, more rows than the context holds, or positions or a
                bias that the language model cannot take.
        """

    def rewind(self, position: int) -> None:
        """Forget everything from a place of the cache on."""

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
        self, turns: Sequence[Turn], pictures: Sequence[Picture], options: GenerationOptions
    ) -> TextGeneration:
        """Start an answer to a conversation.

        Args:
            turns: the conversation, ending with a question.
            pictures: the visual tokens of each, in the order of the turns.
            options: how the answer is written.

        Raises:
            BackendError: a picture that must not be sent, or more positions than the context holds.
            OptionError: a conversation or a form of answer that it cannot take.
        """

    def close(self) -> None:
        """Free the model, or let go of the server; calling it again does nothing."""
