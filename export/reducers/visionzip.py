"""VisionZip: keep the patches the class token looks at, and merge the rest by key similarity.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
arXiv 2412.04467: dominant token selection, contextual token merging.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import typer

from export.reducers.base import Reducer, is_whole
from export.reducers.reduced import Reduced
from export.reducers.selection import (
    assignment_from,
    finite_patches,
    first_by,
    mark_index,
    pick_rows,
    rank_descending,
    unit_rows,
)
from export.towers import Scoring, TowerOutput

MERGES = ("mean", "reference")


@dataclass(frozen=True)
class VisionZip(Reducer):
    """The dominant tokens in spatial order, then the contextual ones.

    Dominant: the class token and the ``dominant - 1`` patches with the highest score; of a tower
    without a class token, ``dominant`` patches. Of the M patches left, in spatial order, every
    ``max(1, floor(M / contextual))``-th is a target, the first ``contextual`` of them; every other
    patch joins the target whose key is nearest (cosine).

    The default merge is the paper's mean: it keeps a merged token as long as a patch, which is what
    the projector was trained on, and answers as well (`docs/accuracy.md`: equal at 64 tokens and
    more, 0.4 points better at 32). Take ``"reference"`` to compare with published figures.

    Deviations from the paper: ``merge="reference"`` is the target plus the mean of the patches
    that joined it, as the released code computes, where the paper's text says the mean of them
    all. Deviations from the released code: a key of zero length has similarity 0 rather than NaN;
    equal scores and equal similarities go to the lower index; a patch that is not finite
    (`finite_patches`) is the last to be kept or a target, and joins nothing.

    Attributes:
        dominant: tokens kept, the class token among them.
        contextual: tokens the rest is merged into; 0 drops the rest.
        merge: ``"mean"`` or ``"reference"``.
    """

    dominant: Annotated[
        int, typer.Option(help="VisionZip: tokens kept as they are, class token included.")
    ]
    contextual: Annotated[int, typer.Option(help="VisionZip: tokens that merge what is not kept.")]
    merge: Annotated[
        str,
        typer.Option(
            help="VisionZip: `mean` (the paper) or `reference` (its code); scope, divprune: `none` "
            "or `nearest`; PruMerge: `sum` (its code), `average` or `none`."
        ),
    ] = "mean"

    name: ClassVar[str] = "visionzip"
    scoring: ClassVar[Scoring] = Scoring.SELECTED_LAYER
    LEAST: ClassVar[Mapping[str, int]] = {"dominant": 1, "contextual": 0}

    def problems(self) -> list[str]:
        """Return what is wrong with the options, one phrase each."""
        if self.merge in MERGES:
            return super().problems()
        return [
            *super().problems(),
            f"merge is {self.merge!r}, expected one of {', '.join(MERGES)}",
        ]

    @classmethod
    def options_for(cls, tokens: int | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Split a budget 27 : 5, as the paper does (64 = 54 + 10), around what the user gave."""
        if tokens is None or {"dominant", "contextual"} <= given.keys():
            return dict(given)
        if "contextual" in given and is_whole(given["contextual"]):
            return {"dominant": tokens - given["contextual"], **given}
        if "dominant" in given and is_whole(given["dominant"]):
            return {"contextual": tokens - given["dominant"], **given}
        contextual = (tokens * 5 + 16) // 32
        return {"dominant": tokens - contextual, "contextual": contextual, **given}

    def token_count(self, patches: int) -> int:
        """Return N for a tower of ``patches`` patches.

        Raises:
            OptionError: N is larger than that.
        """
        return self.check_budget(self.dominant + self.contextual, patches)

    def __call__(self, tower: TowerOutput) -> Reduced:
        """Reduce a batch to ``dominant + contextual`` tokens, all of them valid."""
        features, keys = tower.features.float(), tower.keys.float()
        scores, patches = tower.scores.float(), features.shape[1]
        count = self.token_count(patches)
        index = torch.arange(patches, device=features.device)
        kept_count = self.dominant if tower.class_token is None else self.dominant - 1
        step = max(1, (patches - kept_count) // max(1, self.contextual))

        finite = finite_patches(features, keys, scores[:, :, None])  # [B, P]
        kept = rank_descending(torch.where(finite, scores, -1.0)) < kept_count  # [B, P]
        # Kept patches in spatial order, then the rest in spatial order, what is not finite last.
        group = torch.where(kept, 0, torch.where(finite, patches, 2 * patches))
        order = first_by((group + index).float(), patches)  # [B, P]
        kept_index = order[:, :kept_count]
        target_index = order[:, kept_count::step][:, : self.contextual]

        dominant_index, dominant = kept_index, pick_rows(features, kept_index)
        if tower.class_token is not None:
            no_patch = torch.full_like(order[:, :1], -1)
            dominant_index = torch.cat([no_patch, kept_index], dim=1)
            dominant = torch.cat([tower.class_token.float(), dominant], dim=1)  # [B, dominant, D]
        made_from = torch.cat([dominant_index, target_index], dim=1)  # [B, N]
        origin = torch.cat([dominant_index, torch.full_like(target_index, -1)], dim=1)
        valid = torch.full_like(order[:, 0], count)  # [B]
        if self.contextual == 0:
            assignment = assignment_from(made_from, torch.full_like(order, -1))
            return Reduced(dominant.to(tower.features.dtype), valid, origin, assignment)

        unit_keys = unit_rows(torch.where(finite[:, :, None], keys, 0.0))  # [B, P, Dk]
        similarity = unit_keys @ pick_rows(unit_keys, target_index).transpose(1, 2)  # [B, P, C]
        nearest = similarity.argmax(dim=-1)  # [B, P]
        targets = mark_index(target_index, patches).float().sum(dim=1) > 0  # [B, P]
        free = ~(kept | targets) & finite
        slots = torch.arange(self.contextual, device=features.device)[:, None]
        joined = ((nearest[:, None, :] == slots) & free[:, None, :]).float()  # [B, C, P]
        joined_count = joined.sum(dim=-1, keepdim=True)  # [B, C, 1]
        joined_sum = joined @ torch.where(finite[:, :, None], features, 0.0)  # [B, C, D]
        contextual = pick_rows(features, target_index)
        if self.merge == "mean":
            contextual = (contextual + joined_sum) / (joined_count + 1.0)
        else:
            contextual = contextual + joined_sum / joined_count.clamp(min=1.0)

        tokens = torch.cat([dominant, contextual], dim=1)  # [B, N, D]
        merged = torch.where(free, -(nearest + self.dominant + 2), -1)  # [B, P]
        assignment = assignment_from(made_from, merged)
        return Reduced(tokens.to(tower.features.dtype), valid, origin, assignment)
