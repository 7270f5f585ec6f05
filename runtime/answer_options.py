"""Options of how answers are written, for commands that answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from engines.cli import MaxTokensOption, SeedOption
from engines.errors import OptionError
from runtime.language.generate import GenerationOptions
from runtime.language.grammar import Grammar
from runtime.language.sampling import Sampling

SystemOption = Annotated[
    str | None,
    typer.Option("--system", help="Instructions before the question, if the model takes them."),
]


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is written; the help of each option says what it means."""

    max_tokens: MaxTokensOption = 256
    choices: Annotated[
        str | None,
        typer.Option(help="The answer is one of these, with commas between: yes,no."),
    ] = None
    json_schema: Annotated[
        Path | None, typer.Option(help="The answer is JSON after the schema in this file.")
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends the answer; may be given again."),
    ] = None
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely word; more is more varied.")
    ] = 0.0
    top_k: Annotated[int, typer.Option(help="Draw among the k likeliest tokens; 0: all.")] = 0
    top_p: Annotated[
        float, typer.Option(help="Draw among the fewest tokens with this total probability.")
    ] = 1.0
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 discourages tokens already seen.")
    ] = 1.0
    seed: SeedOption = 0

    def generation(self) -> GenerationOptions:
        """Return the options, checked together.

        Raises:
            OptionError: an option, or two together, that make no sense.
        """
        sampling = Sampling(
            self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed
        )
        return GenerationOptions(self.max_tokens, tuple(self.stop or ()), sampling, self._grammar())

    def _grammar(self) -> Grammar | None:
        if self.choices is not None and self.json_schema is not None:
            raise OptionError("--choices and --json-schema were both given. Give one of them.")
        if self.choices is not None:
            return Grammar(choices=tuple(self.choices.split(",")))
        if self.json_schema is None:
            return None
        try:
            return Grammar(json_schema=self.json_schema.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(
                f"{self.json_schema} cannot be read: {error}. Give a file with a JSON schema."
            ) from error
