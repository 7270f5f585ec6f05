"""`python -m export.tune`: a checkpoint learns to read the tokens a reducer leaves.

Enters: `TuneOptions`: a checkpoint, LLaVA-format conversations, pictures, a reducer. Leaves: a
checkpoint directory that `export.build --model` takes, with the losses and their chart in it. This
is the efficient tuning of the papers: VisionZip tunes the projector, LLaVA-PruMerge adds LoRA in
the language model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import track

from calibration.line_chart import Axes, Line, line_chart
from engines import cli
from engines.errors import OptionError
from engines.staging import staged_file
from export.checkpoint import Checkpoint, open_checkpoint
from export.reducers import REDUCERS, reducer_for_budget
from export.tuning.conversations import ConversationSet, read_conversations, refuse_unusable
from export.tuning.features import ReducedPictures, Track, reduce_pictures
from export.tuning.student import Lora, Student, TrainingPrecision
from export.tuning.training import LOG_FILE, STATE_FILE, Progress, Recipe, TrainingLog, train
from export.tuning.training_text import Row, TrainingText, fit_text, group_rows, write_text
from export.tuning.tuned_checkpoint import write_tuned_checkpoint
from runtime.prompt import PromptWriter

RECORD_FILE, CHART_FILE = "tuning.json", "tuning.svg"
_EXAMPLES = (
    "`python -m export.tune --model DIR --data chat.json --images DIR --tokens 32 --out tuned`",
    "`python -m export.tune --model DIR --data chat.json --images DIR --tokens 64 --lora-rank 16 "
    "--precision bf16 --out tuned`",
    "`python -m export.build --model tuned --tokens 32 --out build/tuned`",
)


@dataclass(frozen=True)
class TuneOptions:
    """What to tune.

    Attributes:
        model: a LLaVA checkpoint's directory, or the name of a Hugging Face repository.
        data: LLaVA-format JSON.
        images: directory of its pictures.
        out: directory of the tuned checkpoint.
        reducer: a name of `export.reducers.REDUCERS`.
        tokens: visual tokens it leaves.
        reducer_options: its other options.
        lora: adapters in the language model; None tunes the projector alone.
        recipe: how to train.
        validation: share of the pictures that is kept out of training, to look at.
        precision: of the computation; what learns is float32 either way.
        device: a PyTorch device; None takes a GPU where there is one.
        work: directory of state and log; None is `<out>.tuning`.
        features: directory of what the tower made of the pictures; None is `features` in `work`.
        fresh: begin again although a run stands in `work`; features are kept.
        overwrite: replace `out`.
    """

    model: str
    data: Path
    images: Path
    out: Path
    reducer: str = "visionzip"
    tokens: int = 64
    reducer_options: Mapping[str, Any] = field(default_factory=dict)
    lora: Lora | None = None
    recipe: Recipe = field(default_factory=Recipe)
    validation: float = 0.05
    precision: TrainingPrecision = "fp32"
    device: str | None = None
    work: Path | None = None
    features: Path | None = None
    fresh: bool = False
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """Where state and log are kept."""
        return self.work or self.out.with_name(f"{self.out.name}.tuning")


@dataclass(frozen=True)
class TuneReport:
    """What came of it.

    Attributes:
        out: the tuned checkpoint.
        conversations: how many were learned from, and looked at.
        pictures: likewise.
        steps: optimizer steps taken.
        tuned_parameters: how many numbers learned.
        processor_seconds: that this call took; of a run that was continued, its last part.
        left_out: conversations left out, by reason.
        log: the losses.
    """

    out: Path
    conversations: int
    pictures: int
    steps: int
    tuned_parameters: int
    processor_seconds: float
    left_out: Mapping[str, int]
    log: TrainingLog


def tune_checkpoint(
    options: TuneOptions,
    show: Track = lambda items, line: items,
    progress: Progress = lambda done, total, line: None,
) -> TuneReport:
    """Tune a checkpoint.

    Args:
        options: what to tune.
        show: wraps what takes long before training.
        progress: told after each step.

    Raises:
        FoveateError: the options, the data or the checkpoint do not allow it, a loss was not a
            number, or the disk is full; `out` is as it was.
    """
    started = time.process_time()
    _refuse_occupied(options)
    checkpoint = open_checkpoint(options.model)
    reducer = reducer_for_budget(
        options.reducer, options.tokens, checkpoint.patch_side**2, **options.reducer_options
    )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    data = read_conversations(options.data, options.images)
    _begin(options)
    names = sorted({one.image for one in data.conversations})
    cache = options.features or options.folder / "features"
    pictures = reduce_pictures(checkpoint, reducer, options.images, names, cache, show, device)
    texts, left_out = _write_texts(checkpoint, options, data, pictures, show)
    training, validation = split_rows(texts, checkpoint, options)
    student = Student(checkpoint, options.lora, options.precision, device)
    recipe = options.recipe
    log = train(student, training, validation, pictures, recipe, options.folder, progress)
    report = TuneReport(
        out=options.out,
        conversations=len(texts),
        pictures=len({image for image, _ in texts}),
        steps=recipe.step_count(len(training)),
        tuned_parameters=sum(one.numel() for one in student.tuned.values()),
        processor_seconds=round(time.process_time() - started, 1),
        left_out=left_out,
        log=log,
    )
    record = {**_describe(options), **json_from_report(report)}
    extra = {RECORD_FILE: json.dumps(record, indent=1) + "\n", CHART_FILE: draw_losses(log)}
    write_tuned_checkpoint(checkpoint, student, options.out, extra)
    return report


def _refuse_occupied(options: TuneOptions) -> None:
    out = options.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / RECORD_FILE).is_file():
        raise OptionError(
            f"--out {out} is there already and was not tuned by this command, so it is not "
            "replaced. Give another directory."
        )
    if not options.overwrite:
        raise OptionError(f"--out {out} is there already. Add --overwrite to replace it.")


def _begin(options: TuneOptions) -> None:
    """Make sure that a run which stands in the working directory is this one.

    Raises:
        OptionError: it is another one.
    """
    file = options.folder / "options.json"
    if options.fresh:
        for name in (STATE_FILE, LOG_FILE, file.name):
            (options.folder / name).unlink(missing_ok=True)
    mine = json.loads(json.dumps(_describe(options)))
    if file.exists():
        theirs = json.loads(file.read_text("utf-8"))
        other = sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key))
        if other:
            raise OptionError(
                f"{options.folder} holds a run with other options ({', '.join(other)}). Give "
                "another directory with --work, or begin again with --fresh."
            )
    with staged_file(file, OptionError) as staged:
        staged.write_text(json.dumps(mine, indent=1) + "\n", "utf-8")


def _describe(options: TuneOptions) -> dict[str, Any]:
    """Return the options that decide what comes out."""
    return {
        "model": options.model,
        "data": str(options.data),
        "reducer": options.reducer,
        "tokens": options.tokens,
        "reducer_options": dict(options.reducer_options),
        "lora": asdict(options.lora) if options.lora else None,
        "recipe": asdict(options.recipe),
        "validation": options.validation,
        "precision": options.precision,
    }


def _write_texts(
    checkpoint: Checkpoint,
    options: TuneOptions,
    data: ConversationSet,
    pictures: ReducedPictures,
    show: Track,
) -> tuple[list[tuple[str, TrainingText]], dict[str, int]]:
    """Return (picture, conversation as ids) of what can be used, and what was left out, by reason.

    Raises:
        OptionError: more than a tenth cannot be used.
    """
    prompt = checkpoint.prompt("tokenizer.json")
    writer = PromptWriter.from_prompt(prompt, checkpoint.root / "tokenizer_config.json")
    room = int(checkpoint.text_config.max_position_embeddings) - pictures.tokens.shape[1]
    unreadable = pictures.unreadable
    bad, long, texts = [], [], []
    for at in show(range(len(data.conversations)), "Tokenizing"):
        conversation = data.conversations[at]
        if conversation.image in unreadable:
            bad.append(f"{conversation.name} ({conversation.image})")
            continue
        text = fit_text(write_text(writer, conversation), room)
        if text is None:
            long.append(conversation.name)
        else:
            texts.append((conversation.image, text))
    total = len(data.conversations)
    refuse_unusable(bad, total, "have a picture that cannot be read")
    refuse_unusable(long, total, f"have a first answer that does not end within {room} positions")
    counts = {
        "text_only": data.text_only,
        "picture_missing": len(data.missing),
        "picture_unreadable": len(bad),
        "too_long": len(long),
    }
    return texts, {reason: count for reason, count in counts.items() if count}


def split_rows(
    texts: Sequence[tuple[str, TrainingText]], checkpoint: Checkpoint, options: TuneOptions
) -> tuple[list[Row], list[Row]]:
    """Return the rows to learn from and those to look at; a picture is in one of them.

    Raises:
        OptionError: there are too few pictures for both.
    """
    if len({text.before for _, text in texts}) > 1:
        raise OptionError(
            f"{checkpoint.root}: the chat template does not put the same text in front of every "
            "picture. Tuning needs one that does."
        )
    names = sorted({image for image, _ in texts})
    count = max(1, round(options.validation * len(names)))
    order = np.random.default_rng(options.recipe.seed).permutation(len(names))
    held = {names[at] for at in order[:count].tolist()}
    longest = int(checkpoint.text_config.max_position_embeddings) - options.tokens
    parts = (
        group_rows([one for one in texts if (one[0] in held) == wanted], longest)
        for wanted in (False, True)
    )
    training, validation = parts
    needed = options.recipe.batch * options.recipe.accumulate
    if len(training) < needed:
        raise OptionError(
            f"{options.data}: {len(training)} pictures are left to learn from, and one step takes "
            f"{needed}. Give more, or a smaller --batch."
        )
    return training, validation


def draw_losses(log: TrainingLog) -> str:
    """Return the losses as an SVG."""
    seen = [look for look in log.looks if look.loss is not None]
    lines = [
        Line("training", [(look.step, look.loss or 0.0) for look in seen]),
        Line("validation", [(look.step, look.validation_loss) for look in log.looks]),
    ]
    drawn = [line for line in lines if line.points]
    return line_chart("Loss of the answers", Axes("step", "cross-entropy"), drawn)


def main(
    model: Annotated[
        str, typer.Option(help="LLaVA checkpoint: a directory, or a Hugging Face name.")
    ],
    data: Annotated[Path, typer.Option(help="Conversations, LLaVA-format JSON.")],
    images: Annotated[Path, typer.Option(help="Directory of their pictures.")],
    out: Annotated[Path, typer.Option(help="Directory of the tuned checkpoint.")],
    reducer: Annotated[str, typer.Option(help=f"One of {', '.join(REDUCERS)}.")] = "visionzip",
    tokens: Annotated[int, typer.Option(min=1, help="Visual tokens it leaves.")] = 64,
    merge: Annotated[
        str | None, typer.Option(help="VisionZip: `mean` (the paper) or `reference` (its code).")
    ] = None,
    lora_rank: Annotated[
        int, typer.Option(min=0, help="Adapters of this rank in the language model; 0: none.")
    ] = 0,
    lora_alpha: Annotated[
        int | None, typer.Option(min=1, help="Their scale times the rank; twice the rank if out.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = Recipe.epochs,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps, instead of epochs.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures of one pass.")] = Recipe.batch,
    accumulate: Annotated[int, typer.Option(min=1, help="Passes of one step.")] = Recipe.accumulate,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="The highest; it falls along a cosine.")
    ] = Recipe.learning_rate,
    weight_decay: Annotated[float, typer.Option(min=0)] = Recipe.weight_decay,
    validation: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the pictures kept out to look at.")
    ] = TuneOptions.validation,
    validate_every: Annotated[
        int, typer.Option(min=1, help="Steps between looks, and between saves.")
    ] = Recipe.validate_every,
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
    seed: cli.SeedOption = 0,
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
        lora=Lora(lora_rank, lora_alpha or 2 * lora_rank) if lora_rank else None,
        recipe=Recipe(
            epochs=epochs,
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            validate_every=validate_every,
            seed=seed,
        ),
        validation=validation,
        precision=_read_precision(precision),
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


def _read_precision(text: str) -> TrainingPrecision:
    choices: tuple[TrainingPrecision, ...] = get_args(TrainingPrecision)
    for choice in choices:
        if choice == text:
            return choice
    raise OptionError(f"--precision {text}: expected one of {', '.join(choices)}.")


def show_tracks(console: Console) -> Track:
    """Return what shows how far a list is gone through."""
    return lambda items, line: track(items, line, console=console)


@contextmanager
def show_training(console: Console) -> Iterator[Progress]:
    """Give a run somewhere to tell its steps: a bar, from the first step on."""
    bar = RichProgress(console=console)
    task = bar.add_task("Training")

    def tell(done: int, total: int, line: str) -> None:
        bar.start()
        bar.update(task, completed=done, total=total, description=f"Training, {line}")

    try:
        yield tell
    finally:
        bar.stop()


def json_from_report(report: TuneReport) -> dict[str, Any]:
    """Return a report for machines."""
    return {
        "out": str(report.out),
        "conversations": report.conversations,
        "pictures": report.pictures,
        "steps": report.steps,
        "tuned_parameters": report.tuned_parameters,
        "processor_seconds": report.processor_seconds,
        "left_out": dict(report.left_out),
        "looks": [asdict(look) for look in report.log.looks],
    }


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


if __name__ == "__main__":
    cli.run(main, _EXAMPLES)
