"""The training loop: AdamW with a cosine schedule, exact resume, and a stop at the first NaN.

The order of rows follows from the seed and the step, and the state of AdamW is kept, so an
interrupted run ends with the weights of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.cli import SeedOption
from engines.errors import OptionError
from engines.staging import staged_file
from export.tune.features import ReducedPictures
from export.tune.student import Score, Student, make_batch
from export.tune.training_text import Row, count_targets

STATE_FILE, LOG_FILE = "state.safetensors", "log.jsonl"


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: how often every row is seen.
        steps: optimizer steps; None: as many as the epochs take.
        batch: rows (pictures) of one pass.
        accumulate: passes of one step.
        learning_rate: highest.
        weight_decay: AdamW's.
        warmup: share of the steps in which the learning rate rises.
        clip: largest norm of a step's gradient.
        validate_every: steps between looks at the validation rows, and between saves.
        seed: of the order of rows.
    """

    epochs: Annotated[int, typer.Option(min=1, help="How often a picture is seen.")] = 1
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps, instead of epochs.")
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="Pictures of one pass.")] = 16
    accumulate: Annotated[int, typer.Option(min=1, help="Passes of one step.")] = 1
    learning_rate: Annotated[
        float, typer.Option(min=0, help="The highest; it falls along a cosine.")
    ] = 1e-3
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 0.0
    warmup: float = 0.03
    clip: float = 1.0
    validate_every: Annotated[
        int, typer.Option(min=1, help="Steps between looks, and between saves.")
    ] = 100
    seed: SeedOption = 0

    def step_count(self, rows: int) -> int:
        """Return how many steps are taken over so many rows."""
        per_epoch = max(1, rows // (self.batch * self.accumulate))
        return self.steps if self.steps is not None else self.epochs * per_epoch

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of a step: it rises linearly and falls as a cosine."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        share = (step - rise) / max(1, steps - rise)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Look:
    """The measurements of a run at one step.

    Attributes:
        step: how many steps were behind.
        loss: mean over the answers' ids since the last look.
        validation_loss: the same over the validation rows.
        validation_right: share of their answers of which every id was the likeliest.
        learning_rate: of the last step.
    """

    step: int
    loss: float | None
    validation_loss: float
    validation_right: float
    learning_rate: float


@dataclass
class TrainingLog:
    """The measurements of a run, kept in a file.

    Attributes:
        file: one JSON object a line.
        looks: all of them.
    """

    file: Path
    looks: list[Look] = field(default_factory=list)

    def resume(self, step: int) -> None:
        """Load the measurements of a run that continues at a step."""
        lines = self.file.read_text("utf-8").splitlines() if self.file.exists() else []
        self.looks = [look for line in lines if (look := Look(**json.loads(line))).step <= step]
        self._write()

    def add(self, look: Look) -> None:
        """Add one measurement."""
        self.looks.append(look)
        self._write()

    def _write(self) -> None:
        with staged_file(self.file) as staged:
            staged.write_text("".join(json.dumps(asdict(look)) + "\n" for look in self.looks))


Progress = Callable[[int, int, str], None]
"""Told after each step: steps done, steps in all, a line about the run."""


def train(
    student: Student,
    rows: Sequence[Row],
    validation: Sequence[Row],
    pictures: ReducedPictures,
    recipe: Recipe,
    folder: Path,
    progress: Progress = lambda done, total, line: None,
    stop_after: int | None = None,
) -> TrainingLog:
    """Train a student in place.

    Args:
        student: what learns.
        rows: what it learns from.
        validation: what it is looked at with.
        pictures: the tokens of all of them.
        recipe: how.
        folder: where state and log are kept; a run that stands there is continued.
        progress: told how far it is.
        stop_after: end after so many steps with what was saved until then, as a power cut would.

    Raises:
        OptionError: a loss was not a number.
    """
    tuned = student.tuned
    optimizer = torch.optim.AdamW(
        tuned.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    steps = recipe.step_count(len(rows))
    step = load_state(folder / STATE_FILE, tuned, optimizer)
    log = TrainingLog(folder / LOG_FILE)
    log.resume(step)
    if not log.looks:
        log.add(_look(student, validation, pictures, recipe, 0, None, 0.0))
    losses: list[float] = []
    while step < min(steps, stop_after or steps):
        rate = recipe.learning_rate_at(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _take_step(student, optimizer, rows_of_step(rows, recipe, step), pictures, recipe)
        step += 1
        _refuse_nan(loss, step, rate)
        losses.append(loss)
        progress(step, steps, f"loss {np.mean(losses[-50:]):.3f}")
        if step % recipe.validate_every == 0 or step == steps:
            save_state(folder / STATE_FILE, tuned, optimizer, step)
            mean = float(np.mean(losses))
            log.add(_look(student, validation, pictures, recipe, step, mean, rate))
            losses = []
    return log


def rows_of_step(rows: Sequence[Row], recipe: Recipe, step: int) -> list[Row]:
    """Return the rows of one step: epoch after epoch, each in an order of its own."""
    size = recipe.batch * recipe.accumulate
    chosen = []
    for place in range(step * size, (step + 1) * size):
        epoch, at = divmod(place, len(rows))
        chosen.append(rows[_order(len(rows), recipe.seed, epoch)[at]])
    return chosen


_ORDERS: dict[tuple[int, int, int], list[int]] = {}


def _order(count: int, seed: int, epoch: int) -> list[int]:
    key = (count, seed, epoch)
    if key not in _ORDERS:
        _ORDERS.clear()
        _ORDERS[key] = np.random.default_rng((seed, epoch)).permutation(count).tolist()
    return _ORDERS[key]


def _take_step(
    student: Student,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    pictures: ReducedPictures,
    recipe: Recipe,
) -> float:
    """Take one step and return the mean loss of the answers' ids."""
    total = count_targets(rows)
    loss = 0.0
    optimizer.zero_grad(set_to_none=True)
    for part in _split(rows, recipe.batch):
        score = student.score(make_batch(part, pictures))
        share = score.loss_sum / total
        share.backward()
        loss += float(share.detach())
    torch.nn.utils.clip_grad_norm_(list(student.tuned.values()), recipe.clip)
    if math.isfinite(loss):
        optimizer.step()
    return loss


def _refuse_nan(loss: float, step: int, rate: float) -> None:
    if not math.isfinite(loss):
        raise OptionError(
            f"The loss of step {step} is {loss} (learning rate {rate:.2e}); the state before "
            "it is kept. Tune with a lower --learning-rate, or with --precision fp32 if it was "
            "bf16; if it is the first step, a weight or a feature is not a number."
        )


@torch.no_grad()
def _look(
    student: Student,
    validation: Sequence[Row],
    pictures: ReducedPictures,
    recipe: Recipe,
    step: int,
    loss: float | None,
    rate: float,
) -> Look:
    scores = [student.score(make_batch(p, pictures)) for p in _split(validation, recipe.batch)]
    return Look(
        step,
        loss,
        float(sum(float(one.loss_sum) for one in scores)) / _total(scores, "targets"),
        _total(scores, "right") / _total(scores, "answers"),
        rate,
    )


def _total(scores: Iterable[Score], name: str) -> int:
    return sum(getattr(one, name) for one in scores)


def _split(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def save_state(
    file: Path, tuned: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write what learns, what AdamW remembers of it and the step, replacing the last at once."""
    tensors = {f"weight/{name}": one.detach() for name, one in tuned.items()}
    moments = optimizer.state_dict()["state"]
    for number, name in enumerate(tuned):
        for kind, value in moments.get(number, {}).items():
            tensors[f"{kind}/{name}"] = torch.as_tensor(value)
    whole = {name: one.cpu().clone().contiguous() for name, one in tensors.items()}
    with staged_file(file) as staged:
        save_file(whole, staged, metadata={"step": str(step)})


def load_state(
    file: Path, tuned: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """Load the state if there is one; return the step to go on with."""
    if not file.exists():
        return 0
    moments: dict[int, dict[str, Tensor]] = {}
    numbers = {name: number for number, name in enumerate(tuned)}
    with safe_open(file, "pt") as state:
        stored: dict[str, Any] = dict(state.metadata() or {})
        for key in state.keys():  # noqa: SIM118 - a safetensors handle is not a dict
            kind, _, name = key.partition("/")
            tensor = state.get_tensor(key)
            if kind == "weight":
                tuned[name].data.copy_(tensor)
            else:
                moments.setdefault(numbers[name], {})[kind] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return int(stored["step"])
