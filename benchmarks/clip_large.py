"""LLaVA-1.5's vision side at its real size, CLIP-L/14-336 and projector, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from export.reducers import Reducer
from export.towers.clip import clip_tower
from export.vision.vision_module import VisionModule

IMAGE_SIZE = 336
PATCHES = 576
FEATURE_LAYER = 23  # LLaVA's -2 of 24
LANGUAGE_WIDTH = 4096  # of a 7B


def random_clip_large(seed: int = 0) -> CLIPVisionModel:
    """Return a CLIP-L/14-336 whose attention is uneven enough for a selection to mean something.

    Weights as small as CLIP's initialisation give every patch nearly the same score; queries and
    keys four times as large spread the logits as training does.
    """
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=IMAGE_SIZE,
        patch_size=14,
        projection_dim=768,
    )
    model: CLIPVisionModel = CLIPVisionModel(config).eval().requires_grad_(False)
    layers: Any = getattr(model, "vision_model", model).encoder.layers
    for layer in layers:
        layer.self_attn.q_proj.weight.mul_(4.0)
        layer.self_attn.k_proj.weight.mul_(4.0)
    return model


def random_projector(seed: int = 0) -> nn.Module:
    """Return LLaVA-1.5's two-layer projector."""
    torch.manual_seed(seed)
    projector = nn.Sequential(
        nn.Linear(1024, LANGUAGE_WIDTH), nn.GELU(), nn.Linear(LANGUAGE_WIDTH, LANGUAGE_WIDTH)
    )
    return projector.eval().requires_grad_(False)


def clip_large_graph(
    model: CLIPVisionModel, projector: nn.Module, reducer: Reducer
) -> VisionModule:
    """Return the whole graph around a reducer."""
    tower = clip_tower(model, (FEATURE_LAYER,), reducer.scoring)
    return VisionModule(tower, reducer, projector, IMAGE_SIZE, PATCHES).eval()
