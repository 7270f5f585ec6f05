"""A reducer of your own, in a bundle: `python -m examples.own_reducer CHECKPOINT build/own`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from export import BuildOptions, build_bundle
from export.reducers import REDUCERS, BudgetReducer, Reduced
from export.reducers.selection import assignment_from, first_by, pick_rows, rank_descending
from export.towers import Scoring, TowerOutput


@dataclass(frozen=True)
class Looked(BudgetReducer):
    """The patches the class token looked at most, in spatial order; the others are dropped."""

    name: ClassVar[str] = "looked"
    scoring: ClassVar[Scoring] = Scoring.SELECTED_LAYER

    def __call__(self, tower: TowerOutput) -> Reduced:
        """Reduce a batch with static shapes, by operators that ONNX and TensorRT have."""
        batch, patches = tower.scores.shape
        index = torch.arange(patches, device=tower.scores.device)
        kept = rank_descending(tower.scores.float()) < self.budget  # [B, P]
        order = torch.where(kept, index, index + patches).float()
        origin = first_by(order, self.token_count(patches))  # [B, N]
        return Reduced(
            tokens=pick_rows(tower.features, origin),  # [B, N, D]
            valid=torch.full((batch,), self.budget, device=origin.device),
            origin=origin,
            assignment=assignment_from(origin, torch.full_like(order, -1).long()),
        )


REDUCERS[Looked.name] = Looked


def main(checkpoint: str, bundle: str) -> None:
    """Export it with 64 tokens and with 32; `runtime.ask` takes the bundle as any other."""
    options = BuildOptions(checkpoint, Path(bundle), reducer=Looked.name, tokens=(64, 32))
    report = build_bundle(options, lambda line, done: print(f"{done:4.0%} {line}"))
    print(f"{report.bundle}: {sum(report.bytes.values()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
