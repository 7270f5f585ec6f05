"""Write protobuf's text format, which Triton reads its `config.pbtxt` in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Union

Value = Union[str, int, float, bool, "Word", Mapping[str, "Value"], Sequence["Value"]]


class Word(str):
    """A name of an enumeration, which is written without quotes."""

    __slots__ = ()


def text_from_message(message: Mapping[str, Value]) -> str:
    """Return a message as text: a mapping is a message, a sequence a repeated field."""
    return "\n".join(_lines(message, "")) + "\n"


def _lines(message: Mapping[str, Value], indent: str) -> Iterator[str]:
    for name, value in message.items():
        repeated = isinstance(value, Sequence) and not isinstance(value, str)
        for one in value if repeated else [value]:  # type: ignore[union-attr]
            if isinstance(one, Mapping):
                yield f"{indent}{name} {{"
                yield from _lines(one, f"{indent}  ")
                yield f"{indent}}}"
            else:
                yield f"{indent}{name}: {_scalar(one)}"


def _scalar(value: Value) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value)  # escapes strings as the text format does, in ASCII
