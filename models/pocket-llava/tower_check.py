"""What the tower knows and where its class token looks, measured on scenes it was not trained on.

A tower and a scene store enter; a dictionary of shares leaves.
"""

from __future__ import annotations

import numpy as np
import torch
from architecture import look, tiles_from_images
from scene_store import SceneStore
from torch import nn


@torch.no_grad()
def class_attention(tower: nn.Module, store: SceneStore, count: int) -> np.ndarray:
    """Return float32[count, P], the class token's attention summed over heads, in layer -2."""
    rows = []
    for start in range(0, count, 50):
        images = torch.from_numpy(np.array(store.images[start : start + 50]))
        tiles = tiles_from_images(images).flatten(1, 2)
        places = torch.arange(tiles.shape[1]).expand(len(tiles), -1)
        rows.append(look(tower, tiles, places).attention.sum(1).numpy())
    return np.concatenate(rows)[:count]


def measure_attention(attention: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measure where attention lies.

    Args:
        attention: float32[N, P], the class token's attention to each patch.
        labels: int8[N, P], see `scenes.label_patches`.

    Returns:
        outliers: share of patches above the third quartile plus 1.5 interquartile ranges.
        outliers_on_objects: share of those that show at least a trace of an object.
        objects_found: share of objects with at least one outlier patch.
        mass_on_objects: share of the attention that lies on object patches.
        top54_on_objects: share of the objects that have a patch among the 54 strongest.
    """
    low, high = np.quantile(attention, [0.25, 0.75], axis=1)
    outlier = attention > (high + 1.5 * (high - low))[:, None]
    top54 = np.zeros_like(outlier)
    np.put_along_axis(top54, np.argsort(-attention, 1)[:, :54], True, 1)
    shown = labels != 0
    found, in_top, objects = 0, 0, 0
    for number in range(1, int(labels.max()) + 1):
        mask = labels == number
        objects += int(mask.any(1).sum())
        found += int((mask & outlier).any(1).sum())
        in_top += int((mask & top54).any(1).sum())
    return {
        "outliers": float(outlier.mean()),
        "outliers_on_objects": float((outlier & shown).sum() / max(1, outlier.sum())),
        "objects_found": found / objects,
        "mass_on_objects": float((attention * shown).sum() / attention.sum()),
        "top54_on_objects": in_top / objects,
    }
