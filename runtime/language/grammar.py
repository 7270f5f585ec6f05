"""Answers of a given form: one of a few choices, or JSON after a schema.

Enters: what an answer may be. Leaves: for every step, the tokens it may go on with. llguidance does
the work (extra `constrained`); a robot gets an answer it can parse, whatever the model would have
liked to say.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.errors import OptionError
from runtime.language.parts import Logits

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WHOLE_BYTES = ("ByteLevel", "ByteFallback")
"""Decoders of tokenizers that can write any byte; of these llguidance knows the tokens itself."""


@dataclass(frozen=True)
class Grammar:
    """What an answer may be; exactly one of the two is given.

    Attributes:
        choices: the answer is one of these.
        json_schema: the answer is JSON after this schema, itself JSON.
    """

    choices: tuple[str, ...] = ()
    json_schema: str | None = None

    def __post_init__(self) -> None:
        if bool(self.choices) == (self.json_schema is not None):
            raise OptionError("Give the choices of an answer, or its JSON schema: one of the two.")
        if any(not choice.strip() for choice in self.choices):
            raise OptionError(
                f"The choices {', '.join(map(repr, self.choices))} have an empty one among them. "
                "Give words, as in --choices yes,no."
            )


class GrammarTokens:
    """A tokenizer as llguidance wants it; making one takes a moment, so keep it."""

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: Collection[int]) -> None:
        """Prepare a tokenizer.

        Raises:
            OptionError: llguidance is not installed.
        """
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise OptionError(
                "Choices and JSON schemas need llguidance, which is not installed. Install it with "
                '`pip install "foveate[constrained]"`.'
            ) from error
        source = tokenizer.to_str()
        stops = list(stop_token_ids)
        if _writes_any_byte(json.loads(source)["decoder"]):
            self._tokens = LLTokenizer(source, eos_token=stops)
        else:
            self._tokens = LLTokenizer(_words(tokenizer, stops), eos_token=stops)

    def start(self, grammar: Grammar) -> Constraint:
        """Return what one answer may be, from its first token on.

        Raises:
            OptionError: llguidance does not take the schema.
        """
        from llguidance import LLMatcher

        if grammar.json_schema is not None:
            source = LLMatcher.grammar_from_json_schema(grammar.json_schema)
        else:
            choices = " | ".join(json.dumps(choice.strip()) for choice in grammar.choices)
            source = LLMatcher.grammar_from_lark(f'start: " "? ({choices})')
        matcher = LLMatcher(self._tokens, source)
        if matcher.is_error():
            raise OptionError(
                f"The form of the answer cannot be used: {matcher.get_error()}. Give a JSON schema "
                "as json-schema.org describes it, or choices."
            )
        return Constraint(matcher)


class Constraint:
    """Which tokens one answer may go on with."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, logits: Logits) -> Logits:
        """Return the logits, minus infinity where a token may not follow.

        Raises:
            OptionError: none may, because the vocabulary cannot write what the answer must be.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        if self._matcher.is_error() or not allowed.any():
            raise OptionError(
                "The model's vocabulary cannot write an answer of this form "
                f"({self._matcher.get_error() or 'no token fits'}). Use words that it knows."
            )
        masked: Logits = np.where(allowed, logits, -np.inf).astype(np.float32)
        return masked

    def accept(self, token: int) -> None:
        """Go on with a token that the mask allowed."""
        self._matcher.consume_token(token)


def _writes_any_byte(decoder: dict[str, Any] | None) -> bool:
    parts = [decoder, *(decoder.get("decoders") or ())] if decoder else []
    return any(part["type"] in _WHOLE_BYTES for part in parts if part)


class _Words:
    """The tokens of a word-level tokenizer as what each adds to a text; see `TokenizerWrapper`."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], stops: list[int]) -> None:
        self.eos_token_id = stops[0]
        self.bos_token_id = None
        self.tokens = tokens
        self.special_token_ids = [at for at, token in enumerate(tokens) if token[:1] == b"\xff"]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _words(tokenizer: Tokenizer, stops: list[int]) -> Any:
    from llguidance import TokenizerWrapper

    special = {at for at, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    size = tokenizer.get_vocab_size()
    before = next(at for at in range(size) if at not in special and tokenizer.decode([at]))
    start = len(tokenizer.decode([before]))
    tokens = [
        b"\xff" + str(at).encode()  # llguidance's mark of a token that is not text
        if at in special or at in stops
        else tokenizer.decode([before, at])[start:].encode()
        for at in range(size)
    ]
    return TokenizerWrapper(_Words(tokenizer, tokens, stops))
