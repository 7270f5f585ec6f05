"""Run a tuning from end to end, and report it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from engines.errors import OptionError
from engines.option_groups import Given, Typed
from engines.staging import staged_file
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.line_chart import Axes, Line, line_chart
from export.options import ModelOption, ReducerOption
from export.reducers import reducer_for_budget
from export.reducers.visionzip import VisionZip
from export.tracks import Track, silently
from export.tune.conversations import ConversationSet, read_conversations, refuse_unusable
from export.tune.features import ReducedPictures, reduce_pictures
from export.tune.student import Lora, Student, TrainingPrecision, lora_of_rank
from export.tune.training import LOG_FILE, STATE_FILE, Progress, Recipe, TrainingLog, train
from export.tune.training_text import Row, TrainingText, fit_text, group_rows, write_text
from export.tune.tuned_checkpoint import write_tuned_checkpoint
from runtime.language.prompt import PromptWriter

RECORD_FILE, CHART_FILE = "tuning.json", "tuning.svg"


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

    model: ModelOption
    data: Annotated[Path, typer.Option(help="Conversations, LLaVA-format JSON.")]
    images: Annotated[Path, typer.Option(help="Directory of their pictures.")]
    out: Annotated[Path, typer.Option(help="Directory of the tuned checkpoint.")]
    reducer: ReducerOption = "visionzip"
    tokens: Annotated[int, typer.Option(min=1, help="Visual tokens it leaves.")] = 64
    reducer_options: Annotated[Mapping[str, Any], Given(VisionZip, names=("merge",))] = field(
        default_factory=dict
    )
    lora: Annotated[
        Lora | None,
        typer.Option(
            "--lora-rank",
            min=0,
            help="Adapters of this rank in the language model; 0 or left out: none.",
        ),
        Typed(lora_of_rank, kind=int),
    ] = None
    recipe: Recipe = field(default_factory=Recipe)
    validation: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the pictures kept out to look at.")
    ] = 0.05
    precision: Annotated[
        TrainingPrecision, typer.Option(help="Of the computation: fp32 or bf16.")
    ] = "fp32"
    device: Annotated[
        str | None, typer.Option(help="A PyTorch device; left out, a GPU where there is one.")
    ] = None
    work: Annotated[
        Path | None, typer.Option(help="Directory of state and log; left out, `<out>.tuning`.")
    ] = None
    features: Annotated[
        Path | None,
        typer.Option(help="Directory of what the tower made of the pictures, for several runs."),
    ] = None
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again; features are kept.")] = False
    overwrite: Annotated[bool, typer.Option(help="Replace the checkpoint at --out.")] = False

    @property
    def folder(self) -> Path:
        """Where state and log are kept."""
        return self.work or self.out.with_name(f"{self.out.name}.tuning")


@dataclass(frozen=True)
class TuneReport:
    """The result of a tuning.

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
    show: Track = silently,
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
    if checkpoint.resolutions is not None:
        raise OptionError(
            f"{checkpoint.name} cuts pictures into tiles, and tuning reads the features of whole "
            "pictures. Give a LLaVA-1.5 checkpoint, or use this one as it is."
        )
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
    """Make sure that a run in the working directory is the same as this one.

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
    """Return the options that the result depends on."""
    return {
        "model": options.model,
        "data_sha256": hashlib.sha256(options.data.read_bytes()).hexdigest(),
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
