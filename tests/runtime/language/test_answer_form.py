"""An answer is read again: has it the form that was asked for, and is it whole."""

from __future__ import annotations

import builtins
import json
from typing import Any

import pytest

from engines.errors import OptionError
from runtime.language.answer_form import is_final, problem_with_form, require_usable
from runtime.language.generate import Finish, finish_of_answer
from runtime.language.grammar import Grammar

pytest.importorskip("jsonschema_rs", reason="jsonschema-rs: the extra `constrained`")
CHOICES = Grammar((" yes ", "yes please", "no"))
SCHEMA = Grammar(
    json_schema=json.dumps(
        {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    )
)
NUMBER = Grammar(json_schema='{"type": "integer"}')


@pytest.mark.parametrize(
    ("reason", "text", "grammar", "finish"),
    [
        ("stop_token", "banana", None, "stop_token"),
        ("stop_token", "banana", CHOICES, "broken_form"),
        ("complete", "ye", CHOICES, "broken_form"),
        ("stop_token", "yes", CHOICES, "complete"),
        ("stop_string", "yes", CHOICES, "complete"),
        ("max_tokens", "yes", CHOICES, "max_tokens"),  # "yes please" may have been meant
        ("max_tokens", "no", CHOICES, "complete"),
        ("context_full", "n", CHOICES, "context_full"),
        ("stop_token", "", SCHEMA, "broken_form"),
        ("max_tokens", "", SCHEMA, "max_tokens"),
        ("complete", '{"n": 1}', SCHEMA, "complete"),
        ("max_tokens", '{"n": 1}', SCHEMA, "complete"),
        ("complete", '{"n": "x"}', SCHEMA, "broken_form"),
        ("max_tokens", "12", NUMBER, "max_tokens"),
        ("stop_token", "12", NUMBER, "complete"),
        ("broken_form", "yes", CHOICES, "complete"),
    ],
)
def test_how_an_answer_ended(
    reason: Finish, text: str, grammar: Grammar | None, finish: Finish
) -> None:
    assert finish_of_answer(reason, text, grammar) == finish


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("banana", "it is not JSON"),
        ("[" * 5000, "it is not JSON"),
        ("NaN", "it is not JSON"),
        ("[]", 'is not of type "object"'),
        ('{"n": 1.5}', "n: 1.5 is not of type"),
    ],
)
def test_the_problem_is_named(text: str, problem: str) -> None:
    assert problem in (problem_with_form(text, SCHEMA) or "")
    assert not problem_with_form('{"n": 1}', SCHEMA)


def test_what_can_go_on() -> None:
    assert not is_final("yes", CHOICES) and is_final("yes please", CHOICES)
    assert not is_final("12", NUMBER) and is_final("null", NUMBER)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("not json", "the schema is not JSON"),
        ("[" * 5000, "the schema is not JSON"),
        ('{"type": "nonsense"}', "cannot be used"),
        ('{"$ref": "file:///etc/passwd"}', "outside the schema, and nothing is fetched"),
        ('{"$ref": "http://127.0.0.1:1/x"}', "outside the schema, and nothing is fetched"),
    ],
)
def test_a_schema_that_cannot_be_used(schema: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        require_usable(Grammar(json_schema=schema))


def test_without_jsonschema_rs(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "jsonschema_rs":
            raise ImportError(name)
        return load(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match=r'pip install "foveate\[constrained\]"'):
        require_usable(Grammar(json_schema='{"title": "seen by nobody yet"}'))
