"""`tokenizer.json`, which comes from elsewhere, opened so that it can be used safely.

Enters: the file. Leaves: a tokenizer without padding and truncation. A chain of replacements can
make a text longer by any factor, so that factor is bounded before any text goes through. The Rust
library panics at what it did not expect; a panic is no `Exception` of Python, and becomes one here.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engines.errors import FoveateError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")

MOST_BYTES = 256 << 20
_MOST_GROWTH = 64
"""A character may become so many; SentencePiece's own table makes 18 of one."""
_MOST_PARTS = 64
_MOST_ID = 2**24
"""The Rust library fills all ids up to the largest when it writes a tokenizer."""


def open_tokenizer(file: Path, error: type[FoveateError]) -> Tokenizer:
    """Read a tokenizer.

    Args:
        file: the `tokenizer.json`.
        error: what to raise when it cannot be used.

    Raises:
        FoveateError: of kind ``error``; damaged, or it lets texts grow without bound.
    """
    from tokenizers import Tokenizer

    def read() -> Tokenizer:
        kind = file.stat()
        if not stat.S_ISREG(kind.st_mode) or kind.st_size > MOST_BYTES:
            raise ValueError(f"not a plain file of at most {MOST_BYTES >> 20} MB")
        tokenizer: Tokenizer = Tokenizer.from_file(str(file))
        for part in (tokenizer.normalizer, tokenizer.decoder):
            _check_growth(part)
        if (most := max(tokenizer.get_vocab().values(), default=0)) > _MOST_ID:
            raise ValueError(f"it has the token id {most:,}, expected at most {_MOST_ID:,}")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        _check_characters(tokenizer)
        return tokenizer

    return without_panic(
        read,
        lambda problem: error(
            f"{file} cannot be read as a tokenizer ({problem}). Take it from where the checkpoint "
            "came from and build the bundle again; if that does not help, update the tokenizers "
            "package."
        ),
    )


def without_panic(work: Callable[[], T], refusal: Callable[[BaseException], FoveateError]) -> T:
    """Call the Rust library, and turn whatever it raises, a panic too, into an error."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        raise refusal(error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise refusal(error) from error


def _check_growth(part: Any) -> None:
    """Bound by how much a normalizer or decoder can lengthen a text.

    Raises:
        ValueError: it has too many parts, or they lengthen a text too much.
    """
    if part is None:
        return
    growth, count = 1, 0
    waiting = [json.loads(part.__getstate__())]
    while waiting:
        step = waiting.pop()
        waiting += [*step.get("normalizers", []), *step.get("decoders", [])]
        count += 1
        if step.get("type") == "Replace":
            # A regular expression may match nothing, which puts the content around each character.
            matches_nothing = "Regex" in step["pattern"] or not step["pattern"].get("String")
            growth *= max(1, len(step["content"]) + (1 if matches_nothing else 0))
        if count > _MOST_PARTS or growth > _MOST_GROWTH:
            raise ValueError(
                f"its {type(part).__name__} makes a text more than {_MOST_GROWTH} times as long, "
                f"or has more than {_MOST_PARTS} parts"
            )


def _check_characters(tokenizer: Tokenizer) -> None:
    """Bound what a table of characters makes of each printable one.

    Raises:
        ValueError: one becomes too many.
    """
    if tokenizer.normalizer is None:
        return
    for code in range(32, 127):
        made = len(tokenizer.normalizer.normalize_str(chr(code)))
        if made > _MOST_GROWTH * 4:
            raise ValueError(f"its normalizer makes {made:,} characters of {chr(code)!r}")
