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
    """VisionZip: per-head softmax of the selected layer, summed over heads; head-mean keys."""
    LAST_LAYER = "last_layer"
    """PruMerge: one full-width softmax of the last layer over all positions; full-width keys."""


@dataclass(frozen=True)
class TowerOutput:
    """Features of a batch of pictures and how much the class token looked at each patch.

    Attributes:
        features: float[B, 1+P, D]; the class token first, then patches in raster order.
        scores: float32[B, P]; attention each patch received from the class token.
        keys: float32[B, 1+P, Dk]; what a reducer measures similarity by.
    """

    features: Tensor
    scores: Tensor
    keys: Tensor
