"""LLaVA-PruMerge: keep the patches that stand out, and merge each with its neighbours.

Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
arXiv 2403.15388: selection by outlier detection on class attention, supplement by key similarity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import Tensor

from export.reducers.base import BudgetReducer, is_number
from export.reducers.reduced import Reduced
from export.reducers.selection import (
    assignment_from,
    finite_patches,
    first_by,
    largest_mask,
    mark_index,
    pick_rows,
    rank_descending,
    unit_rows,
)
from export.towers import Scoring, TowerOutput

NEIGHBOURS = 32
MERGES = ("sum", "average", "none")


@dataclass(frozen=True)
class PruMerge(BudgetReducer):
    """As many tokens as the picture asks for, at most ``budget``, the rest zeros.

    With ``a`` the attention each of P patches received and r the share of them above
    Q3 + 1.5 (Q3 - Q1): the ``floor(P r)`` patches with the highest ``a`` are kept, in that order.
    Token i is x_i plus the sum of a_j x_j over its 32 nearest other patches (cosine of keys, the
    class token not among them); the last valid token is the sum of a_j x_j over the pruned ones.

    ``merge="sum"`` adds sums that are not divided by their weights, as the released code computes
    them. ``"average"`` divides what is added to a kept patch by the sum of its a_j, which the paper
    calls a weighted average and the released code has commented out; the merged token stays a sum.
    ``"none"`` hands the kept patches on as they are, without a merged token. ``ratio`` fixes r
    (the released code's ``if_adaptive=False`` and ``reduction_ratio``).

    Where neither paper nor code says enough, this does:
        * batches: each picture has its own r and count; the released code pools the attention of
          all pictures and keeps as many of each.
        * r = 0 (no patch stands out): nothing is kept, the merged token alone is valid; the best
          patch where there is no merged token.
        * floor(P r) and floor(1 / r) are taken of float64 values, as in the released code: of 49
          patches one outlier keeps none, since 49 * (1 / 49) < 1. No such case at 256 or 576.
        * more patches to keep than the budget has room for: the highest by ``a``; the others count
          as pruned and go into the merged token.
        * fewer than 33 patches: as many neighbours as there are.
        * equal ``a`` or equal similarity: the lower index goes first.
        * a patch that is not finite (`finite_patches`) has ``a`` = 0 and is in no sum.

    Attributes:
        budget: N, the merged token included; at most P + 1.
        ratio: r; 0 lets each picture decide.
        merge: ``"sum"``, ``"average"`` or ``"none"``.
    """

    ratio: Annotated[
        float, typer.Option(help="PruMerge: the share it keeps; 0 lets each picture decide.")
    ] = 0.0
    merge: str = "sum"

    name: ClassVar[str] = "prumerge"
    scoring: ClassVar[Scoring] = Scoring.LAST_LAYER
    LEAST: ClassVar[Mapping[str, int]] = {"budget": 2}

    def problems(self) -> list[str]:
        """Return what is wrong with the options, one phrase each."""
        found = super().problems()
        ratio: Any = self.ratio
        if not is_number(ratio) or not 0 <= ratio <= 1:
            found.append(f"ratio is {ratio!r}, expected a share, 0 to 1")
        if self.merge not in MERGES:
            found.append(f"merge is {self.merge!r}, expected one of {', '.join(MERGES)}")
        return found

    def token_count(self, patches: int) -> int:
        """Return N for a tower of ``patches`` patches, each of which can be kept.

        Raises:
            OptionError: N is larger than all of them and the merged token.
        """
        return self.check_budget(self.budget, patches, merged=int(self.merge != "none"))

    def __call__(self, tower: TowerOutput) -> Reduced:
        """Reduce a batch to N tokens, of which ``valid`` are real."""
        given, keys = tower.features.float(), tower.keys.float()
        count = self.token_count(given.shape[1])
        finite = finite_patches(given, keys, tower.scores.float()[:, :, None])  # [B, P]
        attention = torch.where(finite, tower.scores.float(), 0.0)
        features = torch.where(finite[:, :, None], given, 0.0)
        merging = self.merge != "none"

        rank = rank_descending(torch.where(finite, attention, -1.0))  # [B, P]
        kept, kept_count = self.choose(attention, rank, count - merging)  # [B, room], [B, 1]
        slots = torch.arange(count, device=given.device)
        kept = torch.where(slots[: kept.shape[1]] < kept_count, kept, -1)
        if not merging:
            tokens = torch.where((kept < 0)[:, :, None], 0.0, pick_rows(given, kept.clamp(min=0)))
            assignment = assignment_from(kept, torch.full_like(rank, -1).long())
            return Reduced(tokens.to(tower.features.dtype), kept_count[:, 0], kept, assignment)

        origin = torch.cat([kept, torch.full_like(kept[:, :1], -1)], dim=1)  # [B, N]
        unit_keys = unit_rows(torch.where(finite[:, :, None], keys, 0.0))  # [B, P, Dk]
        sums = self._sums(features, attention, unit_keys, kept)  # [B, N, D]
        padding = (slots >= kept_count)[:, :, None]  # [B, N, 1]
        tokens = sums + pick_rows(given, origin.clamp(min=0))
        tokens = torch.where(padding, 0.0, tokens)
        tokens = torch.where((slots == kept_count)[:, :, None], sums[:, -1:], tokens)
        merged = torch.where(finite, -(kept_count + 2), -1)  # [B, P]
        assignment = assignment_from(origin, merged)
        return Reduced(tokens.to(tower.features.dtype), kept_count[:, 0] + 1, origin, assignment)

    def _sums(self, features: Tensor, attention: Tensor, unit_keys: Tensor, kept: Tensor) -> Tensor:
        """Return what is added to each kept patch, and the merged token last, float32[B, N, D]."""
        patches = features.shape[1]
        chosen = mark_index(kept, patches)  # [B, N-1, P]
        similarity = pick_rows(unit_keys, kept.clamp(min=0)) @ unit_keys.transpose(1, 2)
        # A cosine is at least -1, so -2 keeps a token out of its own neighbours.
        similarity = torch.where(chosen, -2.0, similarity)  # [B, N-1, P]
        near = largest_mask(similarity, min(NEIGHBOURS, patches - 1)).float()
        near = near * attention[:, None, :]
        if self.merge == "average":
            near = near / near.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        pruned = 1.0 - chosen.float().sum(dim=1, keepdim=True)  # [B, 1, P]
        weights = torch.cat([near, pruned * attention[:, None, :]], dim=1)  # [B, N, P]
        return weights @ features

    def choose(self, attention: Tensor, rank: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Choose the patches to keep.

        Args:
            attention: float32[B, P].
            rank: float32[B, P]; place by attention, what is not finite last.
            room: how many may be kept at most.

        Returns:
            Patches in the order they are to be kept, int64[B, room], and how many of them are,
            int64[B, 1].
        """
        return first_by(rank, room), self.count_kept(attention, room)

    def count_kept(self, attention: Tensor, room: int) -> Tensor:
        """Return how many patches are kept for their attention, int64[B, 1]."""
        patches = attention.shape[1]
        least = int(self.merge == "none")  # a picture has one token at least
        if self.ratio > 0:
            count = torch.full_like(attention[:, :1], int(patches * self.ratio)).long()
        else:
            counts = [kept_of(n, patches) for n in range(patches + 1)]
            count = _look_up(counts, count_outliers(attention))
        return count.clamp(min=least, max=room)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge, and a regular grid of patches beside those that stand out.

    After PruMerge's patches come 0, t, 2t, ... < P - 1 that are not kept yet, in that order, with
    t = floor(floor(1 / r) / 3).

    Where the paper and the released code say nothing, this does, beyond what PruMerge does:
        * r = 0: the step of a single outlier, t = floor(P / 3).
        * t = 0: 1. (The rule cannot give it: at most a quarter of the patches is above Q3.)
        * t = 1 keeps all patches or all but one, and with the merged token up to P + 1 tokens, as
          the released code does; so the budget may be P + 1.
        * more patches to keep than the budget has room for: those that stand out go first; of the
          grid, the ones with the lowest ``a`` are left out, wherever in the picture they are.
    """

    name: ClassVar[str] = "prumerge_plus"

    def choose(self, attention: Tensor, rank: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Choose the patches to keep; see `PruMerge.choose`."""
        patches = attention.shape[1]
        index = torch.arange(patches, device=attention.device).float()
        if self.ratio > 0:
            step: Tensor | float = float(max(1, int(1 / self.ratio) // 3))
        else:
            steps = [step_of(n, patches) for n in range(patches + 1)]
            step = _look_up(steps, count_outliers(attention)).float()  # [B, 1]

        outstanding = rank < self.count_kept(attention, patches)
        on_grid = index - torch.floor(index / step) * step == 0.0  # [P] or [B, P]
        spatial = on_grid & (index < patches - 1) & ~outstanding
        group = torch.where(outstanding, 0.0, torch.where(spatial, 1.0, 2.0)) * patches
        kept = first_by(group + rank, room)  # [B, room]
        # Who is in is settled; now put the grid back into spatial order.
        place = group + torch.where(spatial, index, rank)  # [B, P]
        kept = kept.gather(1, first_by(place.gather(1, kept), room))
        wanted = (group < 2.0 * patches).float().sum(dim=1, keepdim=True).long()  # [B, 1]
        return kept, wanted.clamp(max=room)


def count_outliers(attention: Tensor) -> Tensor:
    """Count the patches above Q3 + 1.5 (Q3 - Q1), linearly interpolated percentiles.

    Args:
        attention: float32[B, P].

    Returns:
        int64[B].
    """
    patches = attention.shape[1]
    ascending = torch.topk(-attention, patches, dim=1).values * -1.0  # [B, P]
    first, third = (_percentile(ascending, share) for share in (0.25, 0.75))  # [B, 1]
    outliers = attention > third + 1.5 * (third - first)
    return outliers.float().sum(dim=1).long()


def _percentile(ascending: Tensor, share: float) -> Tensor:
    last = ascending.shape[1] - 1
    place = share * last
    below = int(place)
    above = min(below + 1, last)
    low, high = ascending[:, below : below + 1], ascending[:, above : above + 1]
    return low + (high - low) * (place - below)


def kept_of(outliers: int, patches: int) -> int:
    """Return floor(P r) for the number of patches that stand out."""
    return int(patches * (outliers / patches))


def step_of(outliers: int, patches: int) -> int:
    """Return t of PruMerge+ for the number of patches that stand out."""
    return max(1, int(1 / (max(1, outliers) / patches)) // 3)


def _look_up(table: list[int], index: Tensor) -> Tensor:
    """Return table[index] as a column, int64[B, 1]: dynamic counts by exact integers."""
    return torch.tensor(table, device=index.device).index_select(0, index)[:, None]
