"""The command `python -m export.convert_checkpoint`: what a person types, and what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engines import cli
from export.checkpoint.convert import ConvertOptions, convert_checkpoint

EXAMPLES = (
    "`python -m export.convert_checkpoint llava-v1.5-7b OUT --vision-tower DIR`",
    "`python -m export.convert_checkpoint BASE OUT --projector mm_projector.bin`",
    "`python -m export.convert_checkpoint BASE OUT --lora my-adapter`",
)


def main(
    source: Annotated[Path, typer.Argument(help="Directory of the checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    *,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="CLIP's directory or Hugging Face name; left out, config.json's."),
    ] = None,
    projector: Annotated[
        Path | None, typer.Option(help="File with a projector that replaces the checkpoint's.")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="Directory of LoRA adapters (PEFT), to be merged.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, for a checkpoint without a template.")
    ] = None,
    as_json: cli.JsonOption = False,
) -> None:
    """Write a checkpoint of LLaVA's original layout, or a changed one, as `export.build` reads it.

    Pickled weights are read by PyTorch's reader for tensors, which runs no code of theirs, in a
    process of its own. Every tensor is used and none is made up, or nothing is written.
    """
    done = convert_checkpoint(
        ConvertOptions(source, out, vision_tower, projector, lora, chat_template)
    )
    if as_json:
        cli.print_json({"checkpoint": str(out), "done": done})
        return
    print("\n".join(f"  {line}" for line in done))
    print(f"\nNext: python -m export.build --model {out} --out BUNDLE")
