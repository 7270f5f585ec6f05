"""Baseline reducers that do not look at the picture: all patches, evenly spread, or random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import typer

from export.reducers.base import BudgetReducer, Reducer
from export.reducers.reduced import Reduced
from export.towers import Scoring, TowerOutput


@dataclass(frozen=True)
class KeepAll(Reducer):
    """Every patch in spatial order: LLaVA without reduction.

    Attributes:
        class_token: hand the class token on too, before the patches; for checkpoints whose
            ``vision_feature_select_strategy`` is ``"full"``.
    """

    class_token: bool = False

    name: ClassVar[str] = "none"
    scoring: ClassVar[Scoring] = Scoring.NONE

    def problems(self) -> list[str]:
        """Return what is wrong with the options, one phrase each."""
        given: object = self.class_token
        known = isinstance(given, bool)
        return [] if known else [f"class_token is {given!r}, expected True or False"]

    @classmethod
    def options_for(cls, tokens: int | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Add nothing: the number of tokens is the tower's."""
        return dict(given)

    def token_count(self, patches: int) -> int:
        """Return N: all of them."""
        return patches + self.class_token

    def __call__(self, tower: TowerOutput) -> Reduced:
        """Hand everything on."""
        return _keep(tower, list(range(-int(self.class_token), tower.features.shape[1] - 1)))


@dataclass(frozen=True)
class Uniform(BudgetReducer):
    """Patches evenly spread over the raster: floor((i + 1/2) P / N).

    Attributes:
        budget: N.
    """

    name: ClassVar[str] = "uniform"
    scoring: ClassVar[Scoring] = Scoring.NONE

    def __call__(self, tower: TowerOutput) -> Reduced:
        """Keep the same patches of every picture."""
        patches = tower.features.shape[1] - 1
        count = self.token_count(patches)
        return _keep(tower, [(2 * i + 1) * patches // (2 * count) for i in range(count)])


@dataclass(frozen=True)
class Random(BudgetReducer):
    """Patches drawn without replacement, in spatial order; the same ones for every picture.

    The draw is made once, when the graph is traced, so an engine is deterministic.

    Attributes:
        budget: N.
        seed: of the draw.
    """

    seed: Annotated[int, typer.Option(help="Reducer `random`: its seed.")] = 0

    name: ClassVar[str] = "random"
    scoring: ClassVar[Scoring] = Scoring.NONE
    LEAST: ClassVar[Mapping[str, int]] = {"budget": 1, "seed": 0}

    def __call__(self, tower: TowerOutput) -> Reduced:
        """Keep the same patches of every picture."""
        patches = tower.features.shape[1] - 1
        drawn = np.random.default_rng(self.seed).permutation(patches)[: self.token_count(patches)]
        return _keep(tower, sorted(drawn.tolist()))


def _keep(tower: TowerOutput, kept: list[int]) -> Reduced:
    """Keep the same patches of every picture; -1 is the class token."""
    features = tower.features
    batch, patches = features.shape[0], features.shape[1] - 1
    index = torch.tensor(kept, device=features.device)
    slot_of = {patch: slot for slot, patch in enumerate(kept)}
    slots = torch.tensor([slot_of.get(p, -1) for p in range(patches)], device=features.device)
    return Reduced(
        tokens=features.index_select(1, index + 1),  # [B, N, D]
        valid=torch.full((batch,), len(kept), device=features.device),
        origin=index.expand(batch, -1),
        assignment=slots.expand(batch, -1),
    )
