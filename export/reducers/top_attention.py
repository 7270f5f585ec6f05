"""The patches the class token attends to most, and nothing of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from export.reducers.base import BudgetReducer
from export.reducers.reduced import Reduced
from export.reducers.selection import (
    assignment_from,
    finite_patches,
    first_by,
    pick_rows,
    rank_descending,
)
from export.towers import Scoring, TowerOutput


@dataclass(frozen=True)
class TopAttention(BudgetReducer):
    """The N patches with the highest score, in spatial order.

    Among equals the lower index is kept. A patch that is not finite (`finite_patches`) is kept only
    when no other is left. A token is worth its score.

    Attributes:
        budget: N.
    """

    name: ClassVar[str] = "top_attention"
    scoring: ClassVar[Scoring] = Scoring.SELECTED_LAYER
    weighs: ClassVar[bool] = True

    @property
    def ranks(self) -> bool:
        """By score."""
        return True

    def __call__(self, tower: TowerOutput) -> Reduced:
        """Reduce a batch to N tokens, all of them valid."""
        features, scores = tower.features, tower.scores.float()
        count = self.token_count(features.shape[1])
        finite = finite_patches(features.float(), scores[:, :, None])
        rank = rank_descending(torch.where(finite, scores, -1.0))  # [B, P]
        best = first_by(rank, count)  # [B, N]
        order = first_by(best.float(), count)  # [B, N]
        kept = best.gather(1, order)
        return Reduced(
            tokens=pick_rows(features, kept),
            valid=torch.full_like(kept[:, 0], count),
            origin=kept,
            assignment=assignment_from(kept, torch.full_like(rank, -1).long()),
            order=order,
            worth=torch.where(finite, scores, 0.0).gather(1, kept),
        )
