"""DivPrune: take the patch that is farthest from those taken, so that no two are alike.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
arXiv 2503.02175: the max-min diversity problem, solved greedily.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from export.reducers.ranked import Picked, Ranked
from export.towers import Scoring

_ITSELF, _NOT_FINITE, _TAKEN = 9.0, -3.0, -9.0
"""Above every distance, and below, so that such a patch comes last."""
_FARTHEST = 2.0
"""1 - cosine, of opposite features."""


@dataclass(frozen=True)
class DivPrune(Ranked):
    """The patches that lie farthest from one another, in spatial order.

    Distance is 1 - cosine of features. First the patch whose nearest other patch is farthest, then,
    again and again, the one whose nearest taken patch is farthest. Among equals the lower index is
    taken. It reads no attention, so any tower will do. `Ranked` says what is done with the ranking.
    A token is worth that distance; the first has nothing to be near to, and the largest possible.
    """

    name: ClassVar[str] = "divprune"
    scoring: ClassVar[Scoring] = Scoring.NONE

    def pick(self, cosine: Tensor, scores: Tensor, finite: Tensor, count: int) -> Picked:
        """Take ``count`` patches; see `Ranked.pick`."""
        index = torch.arange(cosine.shape[1], device=cosine.device)
        # Exactly symmetric, so that two patches nearest to each other tie and the lower one wins.
        distance = 1.0 - torch.maximum(cosine, cosine.transpose(1, 2))  # [B, P, P], 0 to 2
        nearest = torch.where(index[:, None] == index, _ITSELF, distance).amin(dim=-1)  # [B, P]
        apart = torch.where(finite, nearest, _NOT_FINITE)[:, None]  # [B, 1, P]
        any_finite = finite.float().amax(dim=1, keepdim=True)  # [B, 1]
        far = finite.float()[:, None]  # [B, 1, P]; what is not finite needs no covering
        taken, uncovered, added = [], [], []
        for place in range(count):
            best = apart.argmax(dim=2, keepdim=True)  # [B, 1, 1]
            added.append(apart.amax(dim=2) if place else any_finite * _FARTHEST)  # [B, 1]
            to_best = distance.gather(1, best.expand(-1, -1, len(index)))  # [B, 1, P]
            far = torch.minimum(far, to_best)
            if place == 0:
                apart = torch.where(finite[:, None], to_best, _NOT_FINITE)
            apart = torch.where(index == best, _TAKEN, torch.minimum(apart, to_best))
            taken.append(best)
            uncovered.append(far)
        return Picked(
            torch.cat(taken, dim=1)[:, :, 0],
            torch.cat(uncovered, dim=1),
            torch.cat(added, dim=1),
        )
