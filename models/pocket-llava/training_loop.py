"""The loop that stages of training run: resume, a step at a time, save and check now and then.

Modules and a function that draws a batch and returns its losses enter; trained modules leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from training_state import ProgressLog, TrainingState


@dataclass(frozen=True)
class Learning:
    """How fast a stage learns, and how many batches it sees."""

    steps: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int


@dataclass(frozen=True)
class StepOutcome:
    """What a step saw: its losses, already weighted, how many pictures, and a word for the log."""

    losses: dict[str, Tensor]
    images: int
    note: str


def learning_rate_at(progress: float, step: int, peak: float, warmup_steps: int) -> float:
    """Warm up linearly, then follow a cosine to 1 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * min(1.0, (step + 1) / warmup_steps) * (0.01 + 0.99 * cosine)


def build_optimizer(
    modules: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Build the optimizer of a stage."""
    return torch.optim.AdamW(
        modules.parameters(), lr=learning_rate, weight_decay=weight_decay,
        betas=(0.9, 0.98), foreach=True,
    )  # fmt: skip


def take_step(
    modules: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float
) -> None:
    """Move the modules one step down the gradient of a loss."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
    optimizer.step()


def run_steps(
    modules: nn.Module,
    learning: Learning,
    losses_at: Callable[[int], StepOutcome],
    state: TrainingState,
    log: ProgressLog,
    measure: Callable[[], dict[str, object]],
    save_every: int = 50,
    measure_every: int = 500,
) -> None:
    """Train in place, from where `state` stands.

    Args:
        modules: what is trained.
        learning: the schedule.
        losses_at: draws the batch of a step and returns its losses; it depends on the step alone.
        state: where to resume from, and to save to.
        log: where losses go, and what is measured.
        measure: measures the modules on validation data.
        save_every: steps between two saves.
        measure_every: steps between two measurements.
    """
    optimizer = build_optimizer(modules, learning.learning_rate, learning.weight_decay)
    step = state.resume(modules, optimizer)
    while step < learning.steps:
        progress = step / learning.steps
        outcome = losses_at(step)
        rate = learning_rate_at(progress, step, learning.learning_rate, learning.warmup_steps)
        loss = torch.stack(list(outcome.losses.values())).sum()
        take_step(modules, optimizer, loss, rate)
        step += 1
        log.record(step, outcome.images, outcome.losses, f"{outcome.note} {progress:.1%}")
        is_last = step == learning.steps
        if step % save_every == 0 or is_last:
            state.save(modules, optimizer, step)
        if step % measure_every == 0 or is_last:
            log.write({"step": step, "validation": measure()})
