"""The kinds of checkpoints that Foveate exports: what transformers calls them and their parts.

Adding one is an entry in `KINDS`; what it does to a picture is a layout of its own
(`runtime.vision.layouts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionMultiModalProjector,
)
from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

from export.checkpoint.weights import LLAVA_PARTS, Part


@dataclass(frozen=True)
class CheckpointKind:
    """A class of transformers.

    Attributes:
        config: its configuration.
        model: the whole of it.
        projector: its projector, made from the configuration.
        parts: what its weights are made of.
        tiled: whether a picture becomes several squares.
        scales_down: whether all tokens of many tiles are scaled down.
        clips: whether a clip has a place of its own in its prompts, and each of several pictures is
            one square.
        select_strategy: its `vision_feature_select_strategy` where the configuration does not say.
    """

    config: Any
    model: Any
    projector: type[nn.Module]
    parts: tuple[Part, ...] = LLAVA_PARTS
    tiled: bool = False
    scales_down: bool = False
    clips: bool = False
    select_strategy: str | None = None

    def select_strategy_of(self, config: Any) -> str:
        """Return what becomes of the class token: "default" drops it, "full" keeps it."""
        return self.select_strategy or str(config.vision_feature_select_strategy)


KINDS = {
    "llava": CheckpointKind(LlavaConfig, LlavaForConditionalGeneration, LlavaMultiModalProjector),
    "llava_next": CheckpointKind(
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextMultiModalProjector,
        parts=(*LLAVA_PARTS, Part.NEWLINE),
        tiled=True,
    ),
    "llava_onevision": CheckpointKind(
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionMultiModalProjector,
        parts=(*LLAVA_PARTS, Part.NEWLINE),
        tiled=True,
        scales_down=True,
        clips=True,
    ),
    "vipllava": CheckpointKind(
        VipLlavaConfig,
        VipLlavaForConditionalGeneration,
        VipLlavaMultiModalProjector,
        select_strategy="default",
    ),
}
"""`model_type` of `config.json` -> its kind."""
