"""SCOPE: take the patch that covers most of what is not covered yet, weighted by its saliency.

Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs",
arXiv 2510.24214: the greedy steps of set coverage, scaled by attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import Tensor

from export.reducers.base import is_number, is_whole
from export.reducers.ranked import Picked, Ranked
from export.towers import Scoring


@dataclass(frozen=True)
class Scope(Ranked):
    """The patches that together resemble all patches best, in spatial order.

    With S the cosine of features and m_i = 0 at first, N times: take the patch j not taken yet
    with the largest ``sum_i max(0, S_ij - m_i) * score_j ** alpha``, then ``m_i = max(m_i, S_ij)``.
    Among equals the lower index is taken. `Ranked` says what is done with the ranking.

    A token is worth that product, the more of its picture it covers and the more salient it is.

    Deviation from the paper: with ``picks_per_step`` q > 1 the sums are computed before every q-th
    patch only. Between, the gain of each other patch i is scaled by ``1 - max(0, S_ij)`` when j is
    taken, so the next one is again good and elsewhere. It divides the costly part by q.

    Attributes:
        alpha: how much saliency counts; 0 leaves it out, and any tower will do.
        picks_per_step: q; 1 is the paper's.
    """

    alpha: Annotated[
        float, typer.Option(help="Reducer `scope`: how much attention counts (0.5).")
    ] = 0.5
    picks_per_step: Annotated[
        int,
        typer.Option(help="Reducer `scope`: patches taken each time gains are computed (1)."),
    ] = 1

    name: ClassVar[str] = "scope"

    def problems(self) -> list[str]:
        """Return what is wrong with the options, one phrase each."""
        found = super().problems()
        alpha: Any = self.alpha
        if not is_number(alpha) or alpha < 0:
            found.append(f"alpha is {alpha!r}, expected a number of 0 or more")
        if not is_whole(self.picks_per_step) or self.picks_per_step < 1:
            found.append(
                f"picks_per_step is {self.picks_per_step!r}, expected a whole number of 1 or more"
            )
        return found

    @property
    def scoring(self) -> Scoring:  # type: ignore[override]  # depends on alpha
        """VisionZip's attention row; nothing where ``alpha`` is 0."""
        return Scoring.SELECTED_LAYER if self.alpha > 0 else Scoring.NONE

    def pick(self, cosine: Tensor, scores: Tensor, finite: Tensor, count: int) -> Picked:
        """Take ``count`` patches; see `Ranked.pick`."""
        index = torch.arange(cosine.shape[1], device=cosine.device)
        distance = 1.0 - cosine.clamp(min=0.0)  # [B, P, P], 0 to 1
        saliency = torch.where(finite, scores**self.alpha, 0.0)[:, None] if self.alpha else 1.0
        # Gains are 0 or more, so these put a patch behind all others, and one taken last.
        behind = torch.where(finite, 0.0, -1.0)[:, None]  # [B, 1, P]
        far = finite.float()[:, None]  # [B, 1, P], 1 - m; what is not finite needs no covering
        taken, uncovered, added = [], [], []
        for place in range(count):
            if place % self.picks_per_step == 0:
                gain = (far - distance).clamp(min=0.0).sum(dim=-1)[:, None] * saliency  # [B, 1, P]
            best = (gain + behind).argmax(dim=2, keepdim=True)  # [B, 1, 1]
            added.append(gain.gather(2, best))
            to_best = distance.gather(1, best.expand(-1, -1, len(index)))  # [B, 1, P]
            far = torch.minimum(far, to_best)
            gain = gain * to_best
            behind = torch.where(index == best, -2.0, behind)
            taken.append(best)
            uncovered.append(far)
        return Picked(
            torch.cat(taken, dim=1)[:, :, 0],
            torch.cat(uncovered, dim=1),
            torch.cat(added, dim=1)[:, :, 0],
        )
