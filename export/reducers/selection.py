"""Choose patches with tensors: ranks, orders and masks that break ties the same way everywhere.

`TopK` promises no order among equal values (PyTorch and TensorRT differ), so only its values are
read, or its keys are made distinct first. Among equals the patch with the lower index goes first.
Everything here is FP32, has static shapes, and uses only operators that TensorRT parses.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def rank_descending(scores: Tensor) -> Tensor:
    """Return each score's place, 0 for the largest; the lower index goes first among equals.

    Args:
        scores: float32[B, P].

    Returns:
        float32[B, P], a permutation of 0 .. P-1 in each row.
    """
    index = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores[:, :, None], scores[:, None, :]
    earlier = (index[None, :] < index[:, None])[None]  # [1, P, P]
    ahead = (other > mine) | ((other == mine) & earlier)  # [B, P, P]
    return ahead.float().sum(dim=-1)  # [B, P]


def first_by(key: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` smallest keys, ascending.

    Args:
        key: float32[B, P], no two equal in a row.
        count: how many; `TopK`'s K.

    Returns:
        int64[B, count].
    """
    return torch.topk(-key, count, dim=-1).indices


def largest_mask(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest values of each row; the lower index goes first among equals.

    Args:
        values: float32[B, n, P].
        count: how many of each row, 0 .. P.

    Returns:
        bool[B, n, P].
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    smallest = torch.topk(values, count, dim=-1).values[..., -1:]  # [B, n, 1]
    above = values > smallest
    equal = values == smallest
    room = count - above.float().sum(dim=-1, keepdim=True)  # [B, n, 1]
    index = torch.arange(values.shape[-1], device=values.device)
    before = (index[:, None] < index[None, :]).float()  # [P, P]
    return above | (equal & (equal.float() @ before < room))


def falling(values: Tensor) -> Tensor:
    """Return the least of each value and those before it, because ONNX has no running minimum.

    Args:
        values: float32[B, N].

    Returns:
        float32[B, N], which nowhere rises.
    """
    index = torch.arange(values.shape[1], device=values.device)
    before = index[None, :] <= index[:, None]  # [N, N]
    return torch.where(before, values[:, None, :], torch.inf).amin(dim=-1)


def pick_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Return the rows an index names.

    Args:
        rows: float[B, P, D].
        index: int64[B, n].

    Returns:
        float[B, n, D].
    """
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))


def unit_rows(rows: Tensor) -> Tensor:
    """Scale each row to length 1; a row of zeros stays one.

    Written out because `ReduceL2`, which `normalize` exports to, changed its form in opset 18.

    Args:
        rows: float32[B, P, D].

    Returns:
        float32[B, P, D].
    """
    return rows / (rows * rows).sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)


def finite_patches(*parts: Tensor) -> Tensor:
    """Return which patches hold finite numbers only.

    Told by the sum of squares, so a patch whose squares overflow float32 counts as not finite, too.

    Args:
        *parts: float32[B, P, n] each.

    Returns:
        bool[B, P].
    """
    largest = torch.finfo(torch.float32).max
    checked = [(part * part).sum(dim=-1) <= largest for part in parts]  # each [B, P]
    return reduce(torch.logical_and, checked)


def mark_index(index: Tensor, patches: int) -> Tensor:
    """Return one-hot rows, because TensorRT has no such scatter.

    Args:
        index: int64[B, n]; -1 marks nothing.
        patches: P.

    Returns:
        bool[B, n, P].
    """
    return index[:, :, None] == torch.arange(patches, device=index.device)


def assignment_from(made_from: Tensor, merged: Tensor) -> Tensor:
    """Say what became of each patch, as `Reduced.assignment` defines it.

    Args:
        made_from: int64[B, N]; the patch each token was made from, -1 for none.
        merged: int64[B, P]; ``-(slot + 2)`` or -1, for the patches no token was made from.

    Returns:
        int64[B, P].
    """
    marks = mark_index(made_from, merged.shape[1]).float()  # [B, N, P]
    slots = torch.arange(made_from.shape[1], device=merged.device).float()
    slot = (marks * slots[:, None]).sum(dim=1).long()  # [B, P]
    return torch.where(marks.sum(dim=1) > 0, slot, merged)
