"""What the tower is asked to know about the part of a scene it looks at.

Patch labels and object rows enter; the targets of `tower_stage` leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from layout import GRID_SIZE, IMAGE_SIZE, KIND_COUNT, MAX_OBJECTS_DENSE, PATCH_SIZE, SHAPES
from torch import Tensor

PLACE_BINS = 12
UNSURE = -100
MIN_VISIBLE_PATCHES = 3


@dataclass(frozen=True)
class PatchTargets:
    """Targets of patches; B views of P patches.

    Attributes:
        color: int64[B, P], 0 background, 1 + colour, or -100.
        shape: int64[B, P], 0 background, 1 + shape, or -100.
        own_place: float32[B, P, 2], the patch's centre in the picture, 0 to 1.
        object_place: float32[B, P, 2], x and base_y of the object it shows.
        object_known: bool[B, P], where `object_place` means something and is in the view.
        attention: float32[B, P], an equal share for each visible object; all 0 if there is none.
    """

    color: Tensor
    shape: Tensor
    own_place: Tensor
    object_place: Tensor
    object_known: Tensor
    attention: Tensor


@dataclass(frozen=True)
class TowerTargets(PatchTargets):
    """Targets of patches and of the class token.

    Attributes:
        presence: float32[B, KIND_COUNT], 1 where the kind is visible.
        presence_known: float32[B, KIND_COUNT], 0 where only a trace of it is visible.
        side: int64[B, KIND_COUNT], third of the picture the kind stands in, or -100.
        count: int64[B], visible objects.
    """

    presence: Tensor
    presence_known: Tensor
    side: Tensor
    count: Tensor


def make_targets(labels: np.ndarray, objects: np.ndarray, places: np.ndarray) -> TowerTargets:
    """Derive the targets.

    Args:
        labels: int8[B, P], the labels of the patches in view.
        objects: float32[B, 8, 4] object rows of the scenes.
        places: int64[B, P], the index of each patch in the full grid.
    """
    batch = np.arange(len(labels))[:, None]
    rows, columns = places // GRID_SIZE, places % GRID_SIZE
    shown = labels > 0
    numbers = np.where(shown, labels, 1).astype(np.int64) - 1  # index into the objects
    kinds = objects[batch, numbers, 0].astype(np.int64)  # [B, P]
    unsure = labels == UNSURE
    color = np.where(shown, 1 + kinds // len(SHAPES), np.where(unsure, UNSURE, 0))
    shape = np.where(shown, 1 + kinds % len(SHAPES), np.where(unsure, UNSURE, 0))
    object_place = objects[batch, numbers, 1:3] / IMAGE_SIZE
    inside = _objects_inside(objects, rows, columns)  # [B, 8]

    attention, visible = share_attention(labels, MAX_OBJECTS_DENSE)
    presence, known, side = _describe_kinds(objects, visible)
    own_place = np.stack([(columns + 0.5) / GRID_SIZE, (rows + 0.5) / GRID_SIZE], -1)
    return TowerTargets(
        color=torch.from_numpy(color),
        shape=torch.from_numpy(shape),
        own_place=torch.from_numpy(own_place.astype(np.float32)),
        object_place=torch.from_numpy(object_place),
        object_known=torch.from_numpy(shown & inside[batch, numbers]),
        presence=torch.from_numpy(presence),
        presence_known=torch.from_numpy(known),
        side=torch.from_numpy(side),
        count=torch.from_numpy((visible >= MIN_VISIBLE_PATCHES).sum(1)),
        attention=torch.from_numpy(attention),
    )


def share_attention(labels: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Give each visible object an equal share of the attention, spread over its patches.

    Args:
        labels: int8[B, P], see `scenes.label_patches`.
        most: the highest number of an object.

    Returns:
        attention: float32[B, P].
        visible: float32[B, most], how many patches show each object.
    """
    one_hot = (labels[..., None] == np.arange(1, most + 1)).astype(np.float32)
    visible = one_hot.sum(1)
    share = one_hot / np.maximum(visible, 1)[:, None]
    objects_in_view = (visible > 0).sum(1)
    attention = share.sum(-1) / np.maximum(objects_in_view, 1)[:, None]
    return attention.astype(np.float32), visible


def _objects_inside(objects: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Say which objects stand within the window with their centre and their base, bool[B, 8]."""
    x, base_y = objects[..., 1] / PATCH_SIZE, objects[..., 2] / PATCH_SIZE
    left, right = columns.min(1)[:, None], columns.max(1)[:, None] + 1
    top, bottom = rows.min(1)[:, None], rows.max(1)[:, None] + 1
    within: np.ndarray = (x >= left) & (x <= right) & (base_y >= top) & (base_y <= bottom)
    return within


def _describe_kinds(
    objects: np.ndarray, visible: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    presence = np.zeros((len(objects), KIND_COUNT), np.float32)
    known = np.ones((len(objects), KIND_COUNT), np.float32)
    side = np.full((len(objects), KIND_COUNT), UNSURE, np.int64)
    scene, slot = np.nonzero(visible > 0)
    kind = objects[scene, slot, 0].astype(np.int64)
    clear = visible[scene, slot] >= MIN_VISIBLE_PATCHES
    presence[scene, kind] = clear
    known[scene, kind] = clear
    third = np.clip(objects[scene, slot, 1] / IMAGE_SIZE * 3, 0, 2).astype(np.int64)
    side[scene, kind] = np.where(clear, third, UNSURE)
    return presence, known, side


def soft_bins(value: Tensor) -> Tensor:
    """Spread a number in 0 to 1 over its two nearest bins, float32[..., PLACE_BINS]."""
    position = value.clamp(0, 1) * (PLACE_BINS - 1)
    return (1 - (position[..., None] - torch.arange(PLACE_BINS)).abs()).clamp(min=0)
