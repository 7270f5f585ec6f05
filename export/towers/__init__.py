"""The interface between vision towers and reducers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor


class Scoring(Enum):
    """Which attention row and keys a reducer wants from the tower."""

    NONE = "none"
    """Features only; `TowerOutput.scores` and `.keys` are empty along their last axis."""
    SELECTED_LAYER = "selected_layer"
    """VisionZip: per-head softmax of the deepest layer that features are of, summed over heads, and
    the mean of its heads' keys."""
    LAST_LAYER = "last_layer"
    """PruMerge: one full-width softmax of the last layer over all positions; full-width keys."""


@dataclass(frozen=True)
class TowerOutput:
    """Features of a batch of pictures and how much attention each patch received.

    Attributes:
        features: float[B, P, D]; patches in raster order, those of several layers in one width.
        scores: float32[B, P]; attention each patch received: from the class token, or, of a tower
            without one, on the mean from all patches.
        keys: float32[B, P, Dk]; what a reducer measures similarity by.
        class_token: float[B, 1, D]; None of a tower that has none.
    """

    features: Tensor
    scores: Tensor
    keys: Tensor
    class_token: Tensor | None = None


def without_scores(features: Tensor, class_token: Tensor | None = None) -> TowerOutput:
    """Return what `Scoring.NONE` asks for.

    Args:
        features: float[B, P, D].
        class_token: float[B, 1, D].
    """
    return TowerOutput(features, features[:, :0, 0], features[:, :, :0], class_token)
