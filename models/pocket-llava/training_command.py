"""The command line of a training from nothing, and where it keeps what."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingCommand:
    """What was asked for: up to which stage, the seed, and the folders.

    Attributes:
        tower_only: stop after the tower.
        seed: of scenes and weights.
        run: where state and logs are.
        scenes: where rendered scenes are kept.
        out: where the checkpoint goes.
        threads: of PyTorch.
    """

    tower_only: bool
    seed: int
    run: Path
    scenes: Path
    out: Path
    threads: int


def read_training_command(text: str | None, here: Path) -> TrainingCommand:
    """Read the command line and make the folder of the run.

    Args:
        text: of the module; its first line is the help.
        here: the model's directory, where runs go by default.
    """
    parser = argparse.ArgumentParser(description=(text or "").split("\n")[0])
    parser.add_argument("--stage", choices=("all", "tower"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="where state and logs go (run-SEED beside this)")
    parser.add_argument("--scenes", type=Path, help="where rendered scenes are kept")
    parser.add_argument("--out", type=Path, help="where the checkpoint goes (the run by default)")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    run = given.run or here / f"run-{given.seed}"
    run.mkdir(parents=True, exist_ok=True)
    return TrainingCommand(
        tower_only=given.stage == "tower",
        seed=given.seed,
        run=run,
        scenes=given.scenes or here / "run-scenes",
        out=given.out or run / "checkpoint",
        threads=given.threads,
    )
