"""LLaVA-PruMerge: keep the patches that stand out, and merge each with its neighbours.

Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
arXiv 2403.15388: selection by outlier detection on class attention, supplement by key similarity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from export.reducers.base import BudgetReducer
from export.reducers.reduced import Reduced
from export.reducers.selection import (
    assignment_from,
    first_by,
    largest_mask,
    mark_index,
    pick_rows,
    rank_descending,
    unit_rows,
)
from export.towers import Scoring, TowerOutput

NEIGHBOURS = 32


@dataclass(frozen=True)
class PruMerge(BudgetReducer):
    """As many tokens as the picture asks for, at most ``budget``, the rest zeros.

    With ``a`` the attention each of P patches received and r the share of them above
    Q3 + 1.5 (Q3 - Q1): the ``floor(P r)`` patches with the highest ``a`` are kept, in that order.
    Token i is x_i plus the sum of a_j x_j over its 32 nearest other patches (cosine of keys, the
    class token not among them); the last valid token is the sum of a_j x_j over the pruned ones.

    Where the paper speaks of weighted averages, these are sums, not divided by their weights, as in
    the released code. Where neither says enough, this does:
        * batches: each picture has its own r and count; the released code takes one picture.
        * r = 0 (no patch stands out): nothing is kept, the merged token alone is valid.
        * floor(P r) and floor(1 / r) are taken of float64 values, as in the released code: of 49
          patches one outlier keeps none, since 49 * (1 / 49) < 1. No such case at 256 or 576.
        * more than ``budget - 1`` patches to keep: the highest ``budget - 1`` by ``a``; the others
          count as pruned and go into the merged token.
        * fewer than 33 patches: as many neighbours as there are.
        * equal ``a`` or equal similarity: the lower index goes first.

    Attributes:
        budget: N, the merged token included.
    """

    name: ClassVar[str] = "prumerge"
    scoring: ClassVar[Scoring] = Scoring.LAST_LAYER
    LEAST: ClassVar[Mapping[str, int]] = {"budget": 2}

    def __call__(self, tower: TowerOutput) -> Reduced:
        """Reduce a batch to N tokens, of which ``valid`` are real."""
        features, attention = tower.features.float()[:, 1:], tower.scores.float()
        patches = features.shape[1]
        slots = torch.arange(self.token_count(patches), device=features.device)

        kept, kept_count = self.choose(attention, len(slots) - 1)  # [B, N-1], [B, 1]
        kept = torch.where(slots[:-1] < kept_count, kept, -1)
        origin = torch.cat([kept, torch.full_like(kept[:, :1], -1)], dim=1)  # [B, N]
        chosen = mark_index(kept, patches)  # [B, N-1, P]

        unit_keys = unit_rows(tower.keys.float()[:, 1:])  # [B, P, Dk]
        similarity = pick_rows(unit_keys, kept.clamp(min=0)) @ unit_keys.transpose(1, 2)
        # A cosine is at least -1, so -2 keeps a token out of its own neighbours.
        similarity = torch.where(chosen, -2.0, similarity)  # [B, N-1, P]
        near = largest_mask(similarity, min(NEIGHBOURS, patches - 1)).float()
        pruned = 1.0 - chosen.float().sum(dim=1, keepdim=True)  # [B, 1, P]
        weights = torch.cat([near, pruned], dim=1) * attention[:, None, :]  # [B, N, P]
        sums = weights @ features  # [B, N, D]

        padding = (slots >= kept_count)[:, :, None]  # [B, N, 1]
        tokens = sums + pick_rows(features, origin.clamp(min=0))
        tokens = torch.where(padding, 0.0, tokens)
        tokens = torch.where((slots == kept_count)[:, :, None], sums[:, -1:], tokens)

        merged = -(kept_count + 2).expand(-1, patches)  # [B, P]
        assignment = assignment_from(origin, merged)
        return Reduced(tokens.to(tower.features.dtype), kept_count[:, 0] + 1, origin, assignment)

    def choose(self, attention: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Choose the patches to keep.

        Args:
            attention: float32[B, P].
            room: how many may be kept at most.

        Returns:
            Patches in the order they are to be kept, int64[B, room], and how many of them are,
            int64[B, 1].
        """
        patches = attention.shape[1]
        outliers = count_outliers(attention)  # [B]
        count = _look_up([kept_of(n, patches) for n in range(patches + 1)], outliers)
        return first_by(rank_descending(attention), room), count.clamp(max=room)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge, and a regular grid of patches beside those that stand out.

    After PruMerge's patches come 0, t, 2t, ... < P - 1 that are not kept yet, in that order, with
    t = floor(floor(1 / r) / 3).

    Where the paper and the released code say nothing, this does, beyond what PruMerge does:
        * r = 0: the step of a single outlier, t = floor(P / 3).
        * t = 0: 1. (The rule cannot give it: at most a quarter of the patches is above Q3.)
        * more than ``budget - 1`` patches to keep: those that stand out go first; of the grid,
          the ones with the lowest ``a`` are left out, wherever in the picture they are.
    """

    name: ClassVar[str] = "prumerge_plus"

    def choose(self, attention: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Choose the patches to keep; see `PruMerge.choose`."""
        patches = attention.shape[1]
        index = torch.arange(patches, device=attention.device).float()
        outliers = count_outliers(attention)  # [B]
        count = _look_up([kept_of(n, patches) for n in range(patches + 1)], outliers)
        step = _look_up([step_of(n, patches) for n in range(patches + 1)], outliers).float()
        rank = rank_descending(attention)  # [B, P]

        adaptive = rank < count
        on_grid = index - torch.floor(index / step) * step == 0.0  # [B, P]
        spatial = on_grid & (index < patches - 1) & ~adaptive
        group = torch.where(adaptive, 0.0, torch.where(spatial, 1.0, 2.0)) * patches
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
