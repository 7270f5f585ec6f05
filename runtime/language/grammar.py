"""Constrain answers to a few choices or to JSON that fits a schema.

llguidance does the work (extra `constrained`): it gives the tokens that may come next at every
step. A robot gets an answer that it can parse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from engines.errors import OptionError
from engines.option_groups import Typed
from runtime.language.parts import Logits

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WHOLE_BYTES = ("ByteLevel", "ByteFallback")
"""Decoders of tokenizers that can write any byte; of these llguidance knows the tokens itself."""
_SPECIAL = re.compile(r"[.^$*+?()\[\]{}|\\]")
"""What a regular expression would not read as itself."""
_ESCAPED = r"\\\g<0>"
_BLANKS = " ?"
"""What may stand between the parts of JSON: blanks without end are an answer that never comes."""
_MOST_CHARACTERS = 1 << 20
_SHOWN_CHARACTERS = 200


def _read_schema(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{file} cannot be read: {error}. Give a file with a JSON schema."
        ) from error


@dataclass(frozen=True)
class Grammar:
    """What an answer may be; exactly one of the two is given.

    Attributes:
        choices: the answer is one of these.
        json_schema: the answer is JSON after this schema, itself JSON.
    """

    choices: Annotated[
        tuple[str, ...],
        typer.Option(help="The answer is one of these, with commas between: yes,no."),
        Typed(lambda words: tuple(words.split(","))),
    ] = ()
    json_schema: Annotated[
        str | None,
        typer.Option(help="The answer is JSON after the schema in this file."),
        Typed(_read_schema, kind=Path),
    ] = None

    def __post_init__(self) -> None:
        if self.choices and self.json_schema is not None:
            raise OptionError("--choices and --json-schema were both given. Give one of them.")
        if not self.choices and self.json_schema is None:
            raise OptionError("Give the choices of an answer, or its JSON schema: one of the two.")
        choices = tuple(choice.strip() for choice in self.choices)
        object.__setattr__(self, "choices", choices)
        if not all(choices):
            raise OptionError(
                f"The choices {', '.join(map(repr, choices))[:_SHOWN_CHARACTERS]} have an empty "
                "one among them. Give words, as in --choices yes,no."
            )
        whole = self.json_schema if self.json_schema is not None else "".join(choices)
        if len(whole) > _MOST_CHARACTERS:
            raise OptionError(
                f"The form of the answer has {len(whole)} characters, expected at most "
                f"{_MOST_CHARACTERS}. Give fewer choices or a shorter schema."
            )
        try:
            whole.encode()
        except UnicodeEncodeError as error:
            raise OptionError(
                f"The form of the answer cannot be used: it is not Unicode text ({error.reason}). "
                "Give it in UTF-8."
            ) from error

    @property
    def regex(self) -> str:
        """A regular expression of the choices; tokens often begin with the blank before a word."""
        return f" ?({'|'.join(_SPECIAL.sub(_ESCAPED, choice) for choice in self.choices)})"


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
        self._never = sorted(_special_ids(tokenizer) - set(stops))
        self._last: tuple[Grammar, Any] | None = None

    def start(self, grammar: Grammar) -> Constraint:
        """Return what one answer may be, from its first token on.

        Raises:
            OptionError: llguidance does not take the form, or the vocabulary cannot write it.
        """
        if self._last is None or self._last[0] != grammar:
            self._last = grammar, self._matcher(grammar)
        constraint = Constraint(self._last[1].deep_copy(), self._never)
        if not constraint.allowed().any():
            raise OptionError(
                "The model's vocabulary cannot write an answer of this form "
                f"({constraint.error or 'no token fits'}). Use words that it knows."
            )
        return constraint

    def _matcher(self, grammar: Grammar) -> Any:
        from llguidance import LLMatcher

        try:
            if grammar.json_schema is None:
                source = LLMatcher.grammar_from_regex(grammar.regex)
            else:
                blanks: Any = {"whitespace_pattern": _BLANKS}  # not in every release's type
                source = LLMatcher.grammar_from_json_schema(grammar.json_schema, defaults=blanks)
            matcher = LLMatcher(self._tokens, source, log_level=0)
            problem = matcher.get_error() if matcher.is_error() else ""
        except ValueError as error:
            problem = str(error)
        if problem:
            raise OptionError(
                f"The form of the answer cannot be used: {_reason(problem)}. Give a JSON "
                "schema as json-schema.org describes it, or choices."
            )
        return matcher


class Constraint:
    """Which tokens one answer may go on with."""

    def __init__(self, matcher: Any, never: Collection[int] = ()) -> None:
        """Begin an answer.

        Args:
            matcher: of llguidance, at its beginning.
            never: ids of control tokens, which it allows where no text fits.
        """
        self._matcher = matcher
        self._never = np.array(list(never), np.int64)

    @property
    def complete(self) -> bool:
        """Whether the answer has its form and nothing can follow."""
        stopped = self._matcher.is_stopped() and not self._matcher.is_error()
        return bool(stopped and self._matcher.is_accepting())

    @property
    def error(self) -> str:
        """What went wrong with the form, in a line; empty if nothing did."""
        return _reason(self._matcher.get_error())

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens may follow, bool[V], V a multiple of eight; at a dead end none."""
        if self._matcher.is_error():
            return np.zeros(8, np.bool_)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed: NDArray[np.bool_] = np.unpackbits(bits, bitorder="little").astype(np.bool_)
        allowed[self._never[self._never < len(allowed)]] = False
        return allowed & (not self._matcher.is_error())

    def mask(self, logits: Logits) -> Logits | None:
        """Return the logits, minus infinity where a token may not follow; None if none may."""
        allowed = self.allowed()[: len(logits)]
        if not allowed.any():
            return None
        masked: Logits = np.full(len(logits), -np.inf, np.float32)
        masked[: len(allowed)][allowed] = logits[: len(allowed)][allowed]
        return masked

    def accept(self, token: int) -> None:
        """Go on with a token that the mask allowed."""
        self._matcher.consume_token(token)


def _reason(problem: str) -> str:
    """Return what llguidance says is wrong, in one line; after it comes all that it knows."""
    return " ".join(problem.split("<state>", maxsplit=1)[0].split())[:_SHOWN_CHARACTERS]


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    return {at for at, token in tokenizer.get_added_tokens_decoder().items() if token.special}


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

    special = _special_ids(tokenizer)
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
