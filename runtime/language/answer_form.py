"""Check whether an answer has the form that was asked for.

A grammar binds the model, but a server may ignore it, a vocabulary may not be able to write it, and
an answer may end too early. Every answer is therefore read again as the robot will read it.
jsonschema-rs does the work for JSON (extra `constrained`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engines.errors import OptionError
from runtime.language.grammar import Grammar

if TYPE_CHECKING:
    from jsonschema_rs import Validator

_SHOWN_CHARACTERS = 300


def problem_with_form(text: str, grammar: Grammar) -> str | None:
    """Return what keeps a text from having a form, in one line; None if nothing does.

    Raises:
        OptionError: the form cannot be used; see `require_usable`.
    """
    if grammar.json_schema is None:
        return None if text in grammar.choices else f"{_short(text)!r} is none of the choices"
    from pydantic_core import from_json

    validator = _validator(grammar.json_schema)
    try:
        document = from_json(text, allow_inf_nan=False)
        error = next(validator.iter_errors(document), None)
    except ValueError as failure:
        return f"it is not JSON ({_short(str(failure))})"
    if error is None:
        return None
    place = ".".join(map(str, error.instance_path))
    return _short(f"{place}: {error.message}" if place else error.message)


def is_final(text: str, grammar: Grammar) -> bool:
    """Return whether nothing could follow a text that has a form, however it ended."""
    if grammar.json_schema is None:
        return not any(choice != text and choice.startswith(text) for choice in grammar.choices)
    return not text.rstrip().endswith(tuple("0123456789"))  # of a number the rest may be missing


def require_usable(grammar: Grammar) -> None:
    """Check that answers can be checked, before one is asked for.

    Raises:
        OptionError: the schema is none, points to a file or a page, or jsonschema-rs is missing.
    """
    if grammar.json_schema is not None:
        _validator(grammar.json_schema)


@lru_cache(maxsize=8)
def _validator(schema: str) -> Validator:
    try:
        from jsonschema_rs import validator_for
    except ImportError as error:
        raise OptionError(
            "JSON schemas need jsonschema-rs, which is not installed. Install it with "
            '`pip install "foveate[constrained]"`.'
        ) from error
    from pydantic_core import from_json

    try:
        document = from_json(schema, allow_inf_nan=False)
    except ValueError as error:
        raise _unusable(f"the schema is not JSON ({error})") from error
    try:
        return validator_for(document, retriever=_refuse)
    except ValueError as error:
        raise _unusable(str(getattr(error, "message", error))) from error


def _refuse(address: str) -> Any:
    raise ValueError(f"{address} is outside the schema, and nothing is fetched")


def _unusable(problem: str) -> OptionError:
    return OptionError(
        f"The form of the answer cannot be used: {_short(problem)}. Give a JSON schema as "
        "json-schema.org describes it."
    )


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _SHOWN_CHARACTERS else words[:_SHOWN_CHARACTERS] + " ..."
