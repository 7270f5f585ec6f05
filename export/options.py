"""Options that several export commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from engines import cli
from engines.errors import OptionError
from engines.manifest import LlmPrecision
from export.language.gguf_quantize import GgufPrecision
from export.language.language_models import DecoderBackend, DecoderOptions
from export.reducers import REDUCERS, USUAL_BUDGETS, Budget

ModelOption = Annotated[
    str, typer.Option("--model", help="LLaVA checkpoint: a directory, or a Hugging Face name.")
]
ReducerOption = Annotated[str, typer.Option("--reducer", help=f"One of {', '.join(REDUCERS)}.")]
MergeOption = Annotated[
    str | None,
    typer.Option("--merge", help="VisionZip: `mean` (the paper) or `reference` (its code)."),
]


@dataclass(frozen=True)
class ReducerFlags:
    """Which reducer, and how many tokens it leaves."""

    reducer: ReducerOption = "visionzip"
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Visual tokens to leave (64 if left out). Several, such as 64,192,all, give a "
            "graph each, with one file of weights; `runtime.ask --visual-tokens` chooses."
        ),
    ] = None
    dominant: Annotated[
        int | None, typer.Option(help="VisionZip: tokens kept as they are, class token included.")
    ] = None
    contextual: Annotated[
        int | None, typer.Option(help="VisionZip: tokens that merge what is not kept.")
    ] = None
    merge: MergeOption = None
    seed: Annotated[int | None, typer.Option(help="Reducer `random`: its seed.")] = None

    def options(self) -> dict[str, int | str]:
        """Return the reducer's own options, as far as they were given."""
        names = ("dominant", "contextual", "merge", "seed")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    def budgets(self) -> tuple[Budget, ...]:
        """Read ``"64"`` or ``"32,64,all"``; left out, what the reducer implies.

        Raises:
            OptionError: something between the commas is not a number of tokens.
        """
        if self.tokens is None and self.reducer == "none":
            return ("all",)
        if self.tokens is None:
            counted = self.dominant is not None and self.contextual is not None
            return () if counted else USUAL_BUDGETS
        words = [word.strip() for word in self.tokens.split(",")]
        wrong = [word for word in words if word != "all" and not word.isdecimal()]
        if wrong:
            raise OptionError(
                f"--tokens {self.tokens}: {', '.join(map(repr, wrong))} is not a number of "
                "tokens. Give one or more with commas between them, such as 64 or 32,64,all."
            )
        return tuple("all" if word == "all" else int(word) for word in words)


@dataclass(frozen=True)
class DecoderFlags:
    """Which language backends get a decoder, and how fine it is."""

    llm_backend: Annotated[
        str, typer.Option(help="ort, llamacpp, or both with a comma; the first is the default.")
    ] = "ort"
    llm_precision: Annotated[str, typer.Option(help="int4 or fp32.")] = "int4"
    gguf_precision: Annotated[
        str | None,
        typer.Option(
            help="llama.cpp: q4_k_m, q8_0, f16 or f32; left out, q4_k_m for int4, f16 for fp32."
        ),
    ] = None

    def options(self) -> DecoderOptions:
        """Return them checked.

        Raises:
            OptionError: one is not among its choices.
        """
        names = (name.strip() for name in self.llm_backend.split(","))
        backends = tuple(cli.one_of("--llm-backend", name, DecoderBackend) for name in names)
        precision = cli.one_of("--llm-precision", self.llm_precision, LlmPrecision)
        if self.gguf_precision is None:
            return DecoderOptions(backends, precision)
        gguf = cli.one_of("--gguf-precision", self.gguf_precision, GgufPrecision)
        return DecoderOptions(backends, precision, gguf)
