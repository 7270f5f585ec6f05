"""What is kept of a ranking: how many of its patches, in which order, and what joins them.

Enters: patches in the order a greedy reducer took them. Leaves: `Reduced`, kept patches first and
in spatial order, the rest padding. The ranking is what allows budgets by content: its first n
patches are what the same method keeps with a budget of n, so a frame may stop early.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import Tensor

from export.reducers.base import BudgetReducer, is_number
from export.reducers.reduced import Reduced
from export.reducers.selection import (
    assignment_from,
    falling,
    finite_patches,
    first_by,
    mark_index,
    pick_rows,
    unit_rows,
)
from export.towers import Scoring, TowerOutput

MERGES = ("none", "nearest")


@dataclass(frozen=True)
class Picked:
    """Patches as a greedy reducer took them.

    Attributes:
        patches: int64[B, N]; the first was taken first.
        uncovered: float32[B, N, P]; how far each patch is from the nearest patch taken so far,
            1 - cosine, at most 1.
        added: float32[B, N]; what each was worth when it was taken; less than 0 is as little as 0.
            Between pictures these can be compared.
    """

    patches: Tensor
    uncovered: Tensor
    added: Tensor


@dataclass(frozen=True)
class Ranked(BudgetReducer):
    """A reducer that takes patches one after another, the most useful first.

    A patch that is not finite (`finite_patches`) is as far from every other as can be, is taken
    only when no other is left, and joins no token.

    Attributes:
        budget: N, the most patches that are kept.
        coverage: a frame stops at the first patch with which what is kept covers this share of it:
            the mean over all patches of the best cosine with a kept one, negative ones counting 0.
            1 never stops early.
        merge: ``"none"`` drops the other patches; ``"nearest"`` makes each token the mean of its
            patch and of the dropped ones that are nearest to it, by cosine of features.
        merge_from: the least cosine at which a dropped patch joins; below, it joins nothing. What
            is far from all that is kept would only blur the token it joins.
    """

    coverage: Annotated[
        float,
        typer.Option(
            help="scope, divprune: a frame keeps only as many tokens as cover this share of it, "
            "--tokens at most; the mean over patches of the best cosine with a kept one."
        ),
    ] = 1.0
    merge: str = "none"
    merge_from: float = 0.7

    weighs: ClassVar[bool] = True

    def problems(self) -> list[str]:
        """Return what is wrong with the options, one phrase each."""
        found = super().problems()
        given: Any = self.coverage
        if not is_number(given) or not 0 < given <= 1:
            found.append(f"coverage is {given!r}, expected a number above 0, at most 1")
        least: Any = self.merge_from
        if not is_number(least) or not -1 <= least <= 1:
            found.append(f"merge_from is {least!r}, expected a cosine, -1 to 1")
        if self.merge not in MERGES:
            found.append(f"merge is {self.merge!r}, expected one of {', '.join(MERGES)}")
        return found

    @property
    def ranks(self) -> bool:
        """Unless others are merged in, and a smaller budget would have other tokens."""
        return self.merge == "none"

    def __call__(self, tower: TowerOutput) -> Reduced:
        """Reduce a batch to at most N tokens, of which ``valid`` are real."""
        given = tower.features.float()  # [B, P, D]
        count = self.token_count(given.shape[1])
        scores = [] if self.scoring is Scoring.NONE else [tower.scores.float()[:, :, None]]
        finite = finite_patches(given, *scores)  # [B, P]
        features = torch.where(finite[:, :, None], given, 0.0)
        unit = unit_rows(features)
        cosine = unit @ unit.transpose(1, 2)  # [B, P, P]
        picked = self.pick(cosine, tower.scores.float(), finite, count)

        slots = torch.arange(count, device=given.device)
        valid = torch.full_like(picked.patches[:, 0], count)  # [B]
        if self.coverage < 1:
            short = picked.uncovered[:, :-1].mean(dim=-1) > 1.0 - self.coverage  # [B, N-1]
            valid = short.float().sum(dim=1).long() + 1
        padding = (slots >= valid[:, None]).float() * given.shape[1]  # [B, N]
        order = first_by(picked.patches.float() + padding, count)  # [B, N]
        real = slots < valid[:, None]  # [B, N]
        kept = torch.where(real, picked.patches.gather(1, order), -1)
        tokens = pick_rows(given, kept.clamp(min=0))  # [B, N, D]
        merged = torch.full_like(finite, -1, dtype=torch.int64)  # [B, P]
        if self.merge == "nearest":
            near = pick_rows(cosine, kept.clamp(min=0))  # [B, N, P]
            # A cosine is at least -1, so -2 keeps everybody off the padding.
            near = torch.where(real[:, :, None], near, -2.0)
            joins = finite & (near.amax(dim=1) >= self.merge_from)  # [B, P]
            tokens, merged = _join_nearest(tokens, features, near, joins, kept)
        tokens = torch.where(real[:, :, None], tokens, 0.0)
        worth = falling(picked.added).clamp(min=0.0)  # [B, N], in the order they were taken
        return Reduced(
            tokens=tokens.to(tower.features.dtype),
            valid=valid,
            origin=kept,
            assignment=assignment_from(kept, merged),
            order=torch.where(real, order, -1) if self.ranks else None,
            worth=torch.where(real, worth.gather(1, order), 0.0),
        )

    @abstractmethod
    def pick(self, cosine: Tensor, scores: Tensor, finite: Tensor, count: int) -> Picked:
        """Take patches one after another.

        Args:
            cosine: float32[B, P, P] of their features; 0 for those that are not finite.
            scores: float32[B, P], or [B, 0] where `scoring` asks for none.
            finite: bool[B, P].
            count: how many to take.
        """


def _join_nearest(
    tokens: Tensor, features: Tensor, near: Tensor, joins: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Let dropped patches join the kept one they are nearest to.

    Args:
        tokens: float32[B, N, D]; the kept patches.
        features: float32[B, P, D]; zeros where not finite.
        near: float32[B, N, P]; cosine of each token with each patch.
        joins: bool[B, P]; which patches may join, the kept ones among them or not.
        kept: int64[B, N]; -1 for padding.

    Returns:
        The means, float32[B, N, D], and for each patch ``-(slot + 2)`` or -1, int64[B, P].
    """
    nearest = near.argmax(dim=1)  # [B, P]
    free = joins & (mark_index(kept, features.shape[1]).float().sum(dim=1) == 0)  # [B, P]
    slots = torch.arange(kept.shape[1], device=kept.device)[:, None]
    joined = ((nearest[:, None, :] == slots) & free[:, None, :]).float()  # [B, N, P]
    means = (tokens + joined @ features) / (joined.sum(dim=-1, keepdim=True) + 1.0)
    return means, torch.where(free, -(nearest + 2), -1)
