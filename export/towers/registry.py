"""The registry of vision towers. Adding one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from engines.errors import CheckpointError
from export.towers import Scoring
from export.towers.clip import ClipTower

TOWERS: dict[str, Callable[[Any, int, Scoring], nn.Module]] = {"clip_vision_model": ClipTower}
"""Hugging Face `model_type` -> tower, made from (model, feature layer, scoring)."""


def make_tower(model: Any, feature_layer: int, scoring: Scoring) -> nn.Module:
    """Make the tower of a model that transformers loaded.

    Raises:
        CheckpointError: no tower of that architecture is known.
    """
    kind = model.config.model_type
    if kind not in TOWERS:
        raise CheckpointError(
            f"vision tower {kind!r} is not one of {', '.join(TOWERS)}. Adding one is one file in "
            "export/towers and one line in its registry."
        )
    return TOWERS[kind](model, feature_layer, scoring)
