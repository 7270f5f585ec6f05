"""Baseline reducers that do not look at the picture: all patches, evenly spread, or random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import typer

from engines.errors import OptionError
from export.reducers.base import BudgetReducer, Reducer
from export.reducers.grid import grid_of
from export.reducers.reduced import Reduced
from export.towers import Scoring, TowerOutput

LAYOUTS = ("grid", "sequential")


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
        kept = _keep(tower, list(range(tower.features.shape[1])))
        if not self.class_token:
            return kept
        if tower.class_token is None:
            raise OptionError(
                "reducer none: class_token is True, and the tower has no class token."
            )
        return Reduced(
            tokens=torch.cat([tower.class_token, kept.tokens], dim=1),
            valid=kept.valid + 1,
            origin=torch.cat([torch.full_like(kept.origin[:, :1], -1), kept.origin], dim=1),
            assignment=kept.assignment + 1,
        )


@dataclass(frozen=True)
class Uniform(BudgetReducer):
    """Patches evenly spread over the picture.

    ``grid``: of each cell of `grid_of`, patch (floor((i + 1/2) S / rows), floor((j + 1/2) S /
    columns)) of S x S. ``sequential``: floor((i + 1/2) P / N) of the patches in reading order,
    whose pattern depends on N: stripes where N divides the side's multiples, staggered elsewhere.

    Attributes:
        budget: N; for a grid, rows x columns with neither larger than the square's side.
        layout: ``"grid"`` or ``"sequential"``.
    """

    layout: Annotated[str, typer.Option(help="Reducer `uniform`: `grid` or `sequential`.")] = "grid"

    name: ClassVar[str] = "uniform"
    scoring: ClassVar[Scoring] = Scoring.NONE

    def problems(self) -> list[str]:
        """Return what is wrong with the options, one phrase each."""
        known = self.layout in LAYOUTS
        wrong = f"layout is {self.layout!r}, expected one of {', '.join(LAYOUTS)}"
        return [*super().problems(), *([] if known else [wrong])]

    def token_count(self, patches: int) -> int:
        """Return N for a tower of ``patches`` patches.

        Raises:
            OptionError: the budget is larger than that, or no grid.
        """
        return len(self.kept(patches))

    def kept(self, patches: int) -> list[int]:
        """Return the patches that are kept, in reading order.

        Raises:
            OptionError: see `token_count`.
        """
        count = self.check_budget(self.budget, patches)
        if self.layout == "sequential":
            return _spread(count, patches)
        rows, columns = grid_of(self.name, count, patches)
        side = isqrt(patches)
        return [y * side + x for y in _spread(rows, side) for x in _spread(columns, side)]

    def __call__(self, tower: TowerOutput) -> Reduced:
        """Keep the same patches of every picture."""
        return _keep(tower, self.kept(tower.features.shape[1]))


def _spread(count: int, length: int) -> list[int]:
    """Return the middles of ``count`` equal parts of ``length``, rounded down."""
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


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
        patches = tower.features.shape[1]
        drawn = np.random.default_rng(self.seed).permutation(patches)[: self.token_count(patches)]
        return _keep(tower, sorted(drawn.tolist()))


def _keep(tower: TowerOutput, kept: list[int]) -> Reduced:
    """Keep the same patches of every picture."""
    features = tower.features
    batch, patches, _ = features.shape
    index = torch.tensor(kept, device=features.device)
    slot_of = {patch: slot for slot, patch in enumerate(kept)}
    slots = torch.tensor([slot_of.get(p, -1) for p in range(patches)], device=features.device)
    return Reduced(
        tokens=features.index_select(1, index),  # [B, N, D]
        valid=torch.full((batch,), len(kept), device=features.device),
        origin=index.expand(batch, -1),
        assignment=slots.expand(batch, -1),
    )
