"""Tune a checkpoint to the tokens a reducer leaves: `python -m export.tune`.

The result is a checkpoint directory that `export.build --model` takes. This is the efficient tuning
of the papers: VisionZip tunes the projector, LLaVA-PruMerge adds LoRA in the language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import track

from engines import cli
from export.options import MergeOption, ModelOption, ReducerOption
from export.tune.features import Track
from export.tune.run import TuneOptions, TuneReport, json_from_report, tune_checkpoint
from export.tune.student import Lora, TrainingPrecision
from export.tune.training import Progress, Recipe

EXAMPLES = (
    "`python -m export.tune --model DIR --data chat.json --images DIR --tokens 32 --out tuned`",
    "`python -m export.tune --model DIR --data chat.json --images DIR --tokens 64 --lora-rank 16 "
    "--precision bf16 --out tuned`",
    "`python -m export.build --model tuned --tokens 32 --out build/tuned`",
)


@dataclass(frozen=True)
class RecipeFlags:
    """How to train."""

    epochs: Annotated[int, typer.Option(min=1, help="How often a picture is seen.")] = Recipe.epochs
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps, instead of epochs.")
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="Pictures of one pass.")] = Recipe.batch
    accumulate: Annotated[int, typer.Option(min=1, help="Passes of one step.")] = Recipe.accumulate
    learning_rate: Annotated[
        float, typer.Option(min=0, help="The highest; it falls along a cosine.")
    ] = Recipe.learning_rate
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = Recipe.weight_decay
    validate_every: Annotated[
        int, typer.Option(min=1, help="Steps between looks, and between saves.")
    ] = Recipe.validate_every
    seed: cli.SeedOption = 0


@dataclass(frozen=True)
class AdapterFlags:
    """What the language model learns."""

    lora_rank: Annotated[
        int, typer.Option(min=0, help="Adapters of this rank in the language model; 0: none.")
    ] = 0
    lora_alpha: Annotated[
        int | None, typer.Option(min=1, help="Their scale times the rank; twice the rank if out.")
    ] = None

    def options(self) -> Lora | None:
        """Return the adapters; None: the language model learns nothing."""
        rank = self.lora_rank
        return Lora(rank, self.lora_alpha or 2 * rank) if rank else None


def main(
    *,
    model: ModelOption,
    data: Annotated[Path, typer.Option(help="Conversations, LLaVA-format JSON.")],
    images: Annotated[Path, typer.Option(help="Directory of their pictures.")],
    out: Annotated[Path, typer.Option(help="Directory of the tuned checkpoint.")],
    reducer: ReducerOption = "visionzip",
    tokens: Annotated[int, typer.Option(min=1, help="Visual tokens it leaves.")] = 64,
    merge: MergeOption = None,
    adapters: AdapterFlags,
    recipe: RecipeFlags,
    validation: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the pictures kept out to look at.")
    ] = TuneOptions.validation,
    precision: Annotated[str, typer.Option(help="Of the computation: fp32 or bf16.")] = "fp32",
    device: Annotated[
        str | None, typer.Option(help="A PyTorch device; left out, a GPU where there is one.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Directory of state and log; left out, `<out>.tuning`.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="Directory of what the tower made of the pictures, for several runs."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again; features are kept.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the checkpoint at --out.")] = False,
    threads: cli.ThreadsOption = None,
    as_json: cli.JsonOption = False,
) -> int:
    """Tune a checkpoint to the few visual tokens a reducer leaves.

    The projector learns, and with `--lora-rank` the language model through adapters that are merged
    in the end; the tower and everything else keep their bits. The same command again continues a
    run that was interrupted.
    """
    options = TuneOptions(
        model=model,
        data=data,
        images=images,
        out=out,
        reducer=reducer,
        tokens=tokens,
        reducer_options={"merge": merge} if merge is not None else {},
        lora=adapters.options(),
        recipe=Recipe(**vars(recipe)),
        validation=validation,
        precision=cli.one_of("--precision", precision, TrainingPrecision),
        device=device,
        work=work,
        features=features,
        fresh=fresh,
        overwrite=overwrite,
    )
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


def show_tracks(console: Console) -> Track:
    """Return a function that shows a progress bar for a list."""
    return lambda items, line: track(items, line, console=console)


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
