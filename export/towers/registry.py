"""The registry of vision towers. Adding one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from engines.errors import CheckpointError
from export.towers import Scoring
from export.towers.clip import clip_tower
from export.towers.siglip import siglip_tower


@dataclass(frozen=True)
class TowerKind:
    """One architecture of vision towers.

    Attributes:
        make: makes the tower from (model, feature layers, scoring).
        class_token: whether its first position is a class token rather than a patch.
    """

    make: Callable[[Any, Sequence[int], Scoring], nn.Module]
    class_token: bool


TOWERS = {
    "clip_vision_model": TowerKind(clip_tower, class_token=True),
    "siglip_vision_model": TowerKind(siglip_tower, class_token=False),
}
"""Hugging Face `model_type` -> its kind."""


def has_class_token(config: PretrainedConfig) -> bool:
    """Return whether the first position of a known tower is a class token."""
    return TOWERS[config.model_type].class_token


def make_tower(model: Any, feature_layers: Sequence[int], scoring: Scoring) -> nn.Module:
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
    return TOWERS[kind].make(model, feature_layers, scoring)
