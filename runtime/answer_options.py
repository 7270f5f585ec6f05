"""The options of every command that writes answers, and what they mean together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engines.errors import OptionError
from runtime.generate import GenerationOptions
from runtime.grammar import Grammar
from runtime.sampling import Sampling

SystemOption = Annotated[
    str | None,
    typer.Option("--system", help="Instructions before the question, if the model takes them."),
]
VisualTokensOption = Annotated[
    int | None,
    typer.Option(
        "--visual-tokens",
        min=1,
        help="Which vision graph, of a bundle with several; left out, the first.",
    ),
]
TemperatureOption = Annotated[
    float,
    typer.Option("--temperature", help="0 takes the most likely word; more is more varied."),
]
TopKOption = Annotated[
    int, typer.Option("--top-k", help="Draw among the k likeliest tokens; 0: all.")
]
TopPOption = Annotated[
    float,
    typer.Option("--top-p", help="Draw among the fewest tokens with this total probability."),
]
RepetitionPenaltyOption = Annotated[
    float,
    typer.Option("--repetition-penalty", help="Above 1 discourages tokens already seen."),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Text that ends the answer; may be given again."),
]
ChoicesOption = Annotated[
    str | None,
    typer.Option("--choices", help="The answer is one of these, with commas between: yes,no."),
]
JsonSchemaOption = Annotated[
    Path | None,
    typer.Option("--json-schema", help="The answer is JSON after the schema in this file."),
]


def grammar_from_options(choices: str | None, json_schema: Path | None) -> Grammar | None:
    """Return the form of an answer, if one is asked for.

    Raises:
        OptionError: both are given, or the schema cannot be read.
    """
    if choices is None and json_schema is None:
        return None
    if choices is not None and json_schema is not None:
        raise OptionError("--choices and --json-schema were both given. Give one of them.")
    if json_schema is None:
        return Grammar(choices=tuple((choices or "").split(",")))
    try:
        return Grammar(json_schema=json_schema.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{json_schema} cannot be read: {error}. Give a file with a JSON schema."
        ) from error


def generation_from_options(
    sampling: Sampling,
    max_tokens: int,
    stop: list[str] | None,
    choices: str | None,
    json_schema: Path | None,
) -> GenerationOptions:
    """Return how answers are written.

    Raises:
        OptionError: an option, or two together, that make no sense.
    """
    grammar = grammar_from_options(choices, json_schema)
    return GenerationOptions(max_tokens, tuple(stop or ()), sampling, grammar)
