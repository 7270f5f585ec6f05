"""Plain reducers to judge the checkpoint by: VisionZip, class-token top-k, random, grid, pooling.

Tower features of a batch enter, fewer of them leave. Training never sees any of these. They are
short and independent of the export's, which is the point of keeping them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from layout import GRID_SIZE
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class SeenBatch:
    """What the reducers choose from.

    Attributes:
        features: float32[B, 1 + P, D], class token first.
        scores: float32[B, P], the class token's attention summed over heads.
        keys: float32[B, P, Dk], the mean over heads of the keys.
    """

    features: Tensor
    scores: Tensor
    keys: Tensor


Reducer = Callable[[SeenBatch, int], Tensor]


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def visionzip(seen: SeenBatch, budget: int, merge: str = "reference") -> Tensor:
    """VisionZip (arXiv 2412.04467): dominant tokens by attention, the rest merged by key.

    Of `budget` tokens 10 in 64 are contextual, and one is the class token.
    """
    contextual = max(1, round(budget * 10 / 64))
    dominant = budget - contextual
    patches = seen.features[:, 1:]
    order = seen.scores.topk(dominant - 1, 1).indices.sort(1).values
    kept = torch.zeros_like(seen.scores, dtype=torch.bool).scatter_(1, order, True)
    left = (~kept).nonzero()[:, 1].view(len(patches), -1)  # [B, M] in spatial order
    features = _take(patches, left)
    keys = functional.normalize(_take(seen.keys, left), dim=-1)
    step = max(1, left.shape[1] // contextual)
    is_target = torch.zeros(left.shape[1], dtype=torch.bool)
    is_target[torch.arange(0, left.shape[1], step)[:contextual]] = True
    target, others = features[:, is_target], features[:, ~is_target]
    nearest = (keys[:, ~is_target] @ keys[:, is_target].transpose(1, 2)).argmax(2)
    assigned = functional.one_hot(nearest, contextual).float().transpose(1, 2)  # [B, C, M - C]
    sums, counts = assigned @ others, assigned.sum(2, keepdim=True)
    if merge == "mean":
        merged = (target + sums) / (1 + counts)
    else:
        merged = target + sums / counts.clamp(min=1)
    return torch.cat([seen.features[:, :1], _take(patches, order), merged], 1)


def visionzip_mean(seen: SeenBatch, budget: int) -> Tensor:
    """VisionZip as the paper's text has it: a contextual token is a mean."""
    return visionzip(seen, budget, merge="mean")


def top_attention(seen: SeenBatch, budget: int) -> Tensor:
    """The patches the class token attends to most, and nothing of the others."""
    order = seen.scores.topk(budget, 1).indices.sort(1).values
    return _take(seen.features[:, 1:], order)


def random_patches(seen: SeenBatch, budget: int) -> Tensor:
    """Patches drawn at random, others for every picture, the same ones every time."""
    generator = torch.Generator().manual_seed(budget)
    order = torch.rand(seen.scores.shape, generator=generator).topk(budget, 1).indices
    return _take(seen.features[:, 1:], order.sort(1).values)


def _grid_shape(budget: int) -> tuple[int, int]:
    """Return the rows and columns of `budget` cells, as square as they come."""
    rows = next(rows for rows in range(int(budget**0.5), 0, -1) if budget % rows == 0)
    return rows, budget // rows


def uniform_grid(seen: SeenBatch, budget: int) -> Tensor:
    """Patches on a regular grid."""
    rows, columns = _grid_shape(budget)
    row = ((torch.arange(rows) + 0.5) * GRID_SIZE / rows).long()
    column = ((torch.arange(columns) + 0.5) * GRID_SIZE / columns).long()
    return seen.features[:, 1 + (row[:, None] * GRID_SIZE + column).flatten()]


def average_pool(seen: SeenBatch, budget: int) -> Tensor:
    """Means over the cells of a regular grid."""
    patches = seen.features[:, 1:].transpose(1, 2)
    plane = patches.reshape(*patches.shape[:2], GRID_SIZE, GRID_SIZE)
    return functional.adaptive_avg_pool2d(plane, _grid_shape(budget)).flatten(2).transpose(1, 2)


def all_patches(seen: SeenBatch, budget: int) -> Tensor:
    """Every patch, as LLaVA does."""
    return seen.features[:, 1:]


REDUCERS: dict[str, Reducer] = {
    "visionzip": visionzip,
    "visionzip_mean": visionzip_mean,
    "top_attention": top_attention,
    "uniform": uniform_grid,
    "random": random_patches,
    "pool": average_pool,
}
