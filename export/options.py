"""Options that several export commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from export.reducers import REDUCERS

ModelOption = Annotated[
    str, typer.Option("--model", help="LLaVA checkpoint: a directory, or a Hugging Face name.")
]
ReducerOption = Annotated[str, typer.Option("--reducer", help=f"One of {', '.join(REDUCERS)}.")]
