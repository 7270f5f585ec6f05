"""Average pooling of the patch grid, the simplest way to reduce tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch

from export.reducers.base import BudgetReducer
from export.reducers.grid import grid_of
from export.reducers.reduced import Reduced
from export.reducers.selection import finite_patches
from export.towers import Scoring, TowerOutput


@dataclass(frozen=True)
class Pool(BudgetReducer):
    """The mean of each cell of a regular grid laid over the square of patches, in raster order.

    The grid has N cells, as nearly square as N allows (64: 8 x 8, 128: 8 x 16). Patch row y of S
    belongs to cell row floor(y * rows / S), and so for columns, so every patch is in one cell. One
    that is not finite (`finite_patches`) is left out of its mean.

    Attributes:
        budget: N; must be rows x columns with neither larger than the square's side.
    """

    name: ClassVar[str] = "pool"
    scoring: ClassVar[Scoring] = Scoring.NONE

    def token_count(self, patches: int) -> int:
        """Return N for a tower of ``patches`` patches.

        Raises:
            OptionError: the patches are no square, or N is no grid that fits in it.
        """
        self.grid(patches)
        return self.budget

    def grid(self, patches: int) -> tuple[int, int]:
        """Return the rows and columns of the grid of cells.

        Raises:
            OptionError: see `token_count`.
        """
        self.check_budget(self.budget, patches)
        return grid_of(self.name, self.budget, patches)

    def __call__(self, tower: TowerOutput) -> Reduced:
        """Pool a batch; a class token is left out."""
        features = tower.features
        batch, patches, _ = features.shape
        rows, columns = self.grid(patches)
        side = isqrt(patches)
        line = torch.arange(side, device=features.device)
        cell = (line * rows // side)[:, None] * columns + line * columns // side  # [S, S]
        cells = torch.arange(self.budget, device=features.device)
        member = (cells[:, None] == cell.flatten()).float()  # [N, P]
        finite = finite_patches(features.float())  # [B, P]
        member = member * finite.float()[:, None, :]  # [B, N, P]
        sums = member @ torch.where(finite[:, :, None], features.float(), 0.0)
        tokens = sums / member.sum(dim=-1, keepdim=True).clamp(min=1.0)  # [B, N, D]
        return Reduced(
            tokens=tokens.to(features.dtype),
            valid=torch.full((batch,), self.budget, device=features.device),
            origin=torch.full((batch, self.budget), -1, device=features.device),
            assignment=torch.where(finite, -(cell.flatten() + 2), -1),
        )
