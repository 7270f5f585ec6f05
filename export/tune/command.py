"""Tune a checkpoint to the tokens a reducer leaves: `python -m export.tune`.

The result is a checkpoint directory that `export.build --model` takes. This is the efficient tuning
of the papers: VisionZip tunes the projector, LLaVA-PruMerge adds LoRA in the language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress as RichProgress

from engines import cli
from export.tracks import show_tracks
from export.tune.run import TuneOptions, TuneReport, json_from_report, tune_checkpoint
from export.tune.student import Lora
from export.tune.training import Progress

EXAMPLES = (
    "`python -m export.tune --model DIR --data chat.json --images DIR --tokens 32 --out tuned`",
    "`python -m export.tune --model DIR --data chat.json --images DIR --tokens 64 --lora-rank 16 "
    "--precision bf16 --out tuned`",
    "`python -m export.build --model tuned --tokens 32 --out build/tuned`",
)


def main(
    *,
    options: TuneOptions,
    lora_alpha: Annotated[
        int | None, typer.Option(min=1, help="Their scale times the rank; twice the rank if out.")
    ] = None,
    threads: cli.ThreadsOption = None,
    as_json: cli.JsonOption = False,
) -> int:
    """Tune a checkpoint to the few visual tokens a reducer leaves.

    The projector learns, and with `--lora-rank` the language model through adapters that are merged
    in the end; the tower and everything else keep their bits. The same command again continues a
    run that was interrupted.
    """
    if options.lora is not None and lora_alpha is not None:
        options = replace(options, lora=Lora(options.lora.rank, lora_alpha))
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    with show_training(console) as progress:
        report = tune_checkpoint(options, show_tracks(console), progress)
    if as_json:
        cli.print_json(json_from_report(report))
    else:
        _tell_report(report)
    return 0


@contextmanager
def show_training(console: Console) -> Iterator[Progress]:
    """Show a progress bar from the first step on."""
    bar = RichProgress(console=console)
    task = bar.add_task("Training")

    def tell(done: int, total: int, line: str) -> None:
        bar.start()
        bar.update(task, completed=done, total=total, description=f"Training, {line}")

    try:
        yield tell
    finally:
        bar.stop()


def _tell_report(report: TuneReport) -> None:
    first, last = report.log.looks[0], report.log.looks[-1]
    print(
        f"{report.pictures} pictures, {report.conversations} conversations, {report.steps} steps, "
        f"{report.tuned_parameters:,} numbers tuned"
    )
    for reason, count in report.left_out.items():
        print(f"  left out: {count} ({reason.replace('_', ' ')})")
    print(f"  validation loss     {first.validation_loss:.4f} -> {last.validation_loss:.4f}")
    print(f"  validation answers  {first.validation_right:.1%} -> {last.validation_right:.1%}")
    print(f"\nNext: python -m export.build --model {report.out} --out build/tuned")
