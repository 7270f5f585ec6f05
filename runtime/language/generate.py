"""The decoding loop: logits become an answer, piece by piece.

A piece never ends in the middle of a character.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import typer

from engines.errors import OptionError
from engines.option_groups import Typed
from runtime.language.answer_form import is_final, problem_with_form
from runtime.language.grammar import Constraint, Grammar
from runtime.language.parts import Logits
from runtime.language.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Finish = Literal[
    "stop_token",
    "stop_string",
    "complete",
    "broken_form",
    "max_tokens",
    "context_full",
    "interrupted",
]
"""Without a form: the model stopped, or a stop string came. With one: `complete` if the answer has
that form, checked, and nothing is missing, and `broken_form` if it has not. After the last three it
may be cut short; `interrupted`: the caller stopped it."""
USUAL_TOKENS = 256
"""The longest answer where neither the user nor the checkpoint says one."""
MOST_TOKENS = 2048
"""The longest that a checkpoint alone may ask for; a user may ask for more."""
_CUT: tuple[Finish, ...] = ("max_tokens", "context_full", "interrupted")


def finish_of_answer(reason: Finish, text: str, grammar: Grammar | None) -> Finish:
    """Return why an answer ended, once it was checked against the form it must have.

    Args:
        reason: why its writer stopped.
        text: all of the answer.
        grammar: the form, if there is one.
    """
    if grammar is None:
        return reason
    broken = problem_with_form(text, grammar) is not None
    if reason in _CUT and (broken or not is_final(text, grammar)):
        return reason
    return "broken_form" if broken else "complete"


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is written and when it ends.

    Attributes:
        max_tokens: most tokens of an answer; None: as the checkpoint says, or `USUAL_TOKENS`.
        stop: texts that end the answer; they are not part of it.
        sampling: how each token is chosen.
        grammar: the form of the answer, if it must have one; leading blanks are dropped then.
    """

    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            help="Longest answer, in tokens; left out, what the checkpoint says, or 256 (64 about "
            "the frames of a camera).",
        ),
    ] = None
    stop: Annotated[
        tuple[str, ...],
        typer.Option(help="Text that ends the answer; may be given again."),
        Typed(tuple, list, list[str]),
    ] = ()
    sampling: Sampling = field(default_factory=Sampling)
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise OptionError(f"max_tokens is {self.max_tokens}, expected 1 or more.")
        if "" in self.stop:
            raise OptionError("A stop string is empty, which would end every answer at once.")

    @property
    def most_tokens(self) -> int:
        """Most tokens of an answer, the default filled in."""
        return USUAL_TOKENS if self.max_tokens is None else self.max_tokens

    def limited(
        self, said: int | None, usual: int = USUAL_TOKENS, most: int = MOST_TOKENS
    ) -> GenerationOptions:
        """Return the options with a longest answer where the user gave none.

        Args:
            said: what the checkpoint says, if it says something.
            usual: what it is otherwise.
            most: the longest that may come of it.
        """
        if self.max_tokens is not None:
            return self
        return replace(self, max_tokens=min(said or usual, most))


class Decoding(Protocol):
    """What writing an answer needs of a language backend, or of a `Context` over one."""

    @property
    def position(self) -> int:
        """Positions filled so far."""

    @property
    def context_length(self) -> int:
        """Positions the KV cache holds."""

    def decode(self, token: int) -> Logits:
        """Append one token and return the logits after it, float32[V]."""


class Generation:
    """One answer in the making: iterate over it for its pieces of text.

    Attributes:
        token_ids: tokens of the answer so far, without the stop token.
        text: the answer so far.
        finish: why it ended; None while it has not.
        prompt_tokens: positions of the prompt.
        reused_tokens: how many of them were in the KV cache already.
    """

    def __init__(
        self,
        backend: Decoding,
        logits: Logits,
        tokenizer: Tokenizer,
        *,
        stop_token_ids: Collection[int],
        options: GenerationOptions,
        prompt_ids: Sequence[int] = (),
        prompt_tokens: int = 0,
        reused_tokens: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.finish: Finish | None = None
        self.prompt_tokens = prompt_tokens
        self.reused_tokens = reused_tokens
        self._backend = backend
        self._logits = logits
        self._tokenizer = tokenizer
        self._stop_token_ids = frozenset(stop_token_ids)
        self._options = options
        self._sampler = Sampler(options.sampling, prompt_ids)
        self._constraint = constraint
        self._reason: Finish | None = None

    def prefill(self) -> None:
        """Do nothing: the prompt was read before the answer began."""

    def __iter__(self) -> Generator[str]:
        """Yield the answer's pieces of text as they are written."""
        yield from self._pieces()
        if self._reason is not None:
            self.finish = finish_of_answer(self._reason, self.text, self._options.grammar)

    def _pieces(self) -> Iterator[str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        decoded = ""  # what the tokenizer has given so far; `self.text` may lag behind it
        for token in self._tokens():
            decoded += stream.step(self._tokenizer, token) or ""
            yield from self._release(decoded, final=False)
            if self._reason == "stop_string":
                return
        # Whole again, for the bytes of a character that was never finished.
        yield from self._release(self._tokenizer.decode(self.token_ids), final=True)

    def _tokens(self) -> Iterator[int]:
        """Yield tokens; one that is yielded enters the cache only when another is wanted."""
        while self._reason is None:
            token = self._choose()
            if token is None:
                self._reason = "broken_form"
                return
            if token in self._stop_token_ids:
                self._reason = "stop_token"
                return
            self.token_ids.append(token)
            yield token
            if self._constraint is not None and self._constraint.complete:
                self._reason = "complete"
            elif len(self.token_ids) == self._options.most_tokens:
                self._reason = "max_tokens"
            elif self._backend.position == self._backend.context_length:
                self._reason = "context_full"
            else:
                self._logits = self._backend.decode(token)

    def _choose(self) -> int | None:
        """Return the next token; None if the form allows none that the vocabulary has."""
        if self._constraint is None:
            return self._sampler.choose(self._logits)
        masked = self._constraint.mask(self._logits)
        if masked is None:
            return None
        token = self._sampler.choose(masked)
        self._constraint.accept(token)
        return token

    def _release(self, decoded: str, final: bool) -> Iterator[str]:
        """Yield what is new and cannot be the beginning of a stop string."""
        if self._constraint is not None:
            decoded = decoded.lstrip()
        stops = [at for stop in self._options.stop if (at := decoded.find(stop)) >= 0]
        if stops:
            decoded, final = decoded[: min(stops)], True
            self._reason = "stop_string"
        end = len(decoded) if final else len(decoded) - _held_back(decoded, self._options.stop)
        piece = decoded[len(self.text) : end]
        if piece:
            self.text += piece
            yield piece


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of ``text`` may begin a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for count in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0
