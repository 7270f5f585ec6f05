"""The CLIP vision tower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from export.towers import Scoring
from export.towers.encoder import EncoderTower


def clip_tower(
    model: CLIPVisionModel, feature_layers: Sequence[int], scoring: Scoring
) -> EncoderTower:
    """Make the tower of a CLIP that transformers loaded; see `EncoderTower`.

    Raises:
        OptionError: a feature layer is not one of the tower's, or there is none.
    """
    # Older releases of transformers wrap the transformer once more.
    inner = getattr(model, "vision_model", model)
    embeddings = PatchEmbeddings(inner.embeddings, inner.pre_layrnorm)
    return EncoderTower(
        embeddings, list(inner.encoder.layers), feature_layers, scoring, class_token=True
    )


class PatchEmbeddings(nn.Module):
    """Pixels -> the class token and one token per patch, with positions, normalised."""

    def __init__(self, embeddings: CLIPVisionEmbeddings, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.patch_embedding = embeddings.patch_embedding
        self.class_embedding = embeddings.class_embedding
        self.position_embedding = embeddings.position_embedding.weight
        self.norm = norm

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return float32[B, 1+P, D]."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B, P, D]
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)  # [B, 1, D]
        tokens = torch.cat([class_token, patches], dim=1) + self.position_embedding
        normed: Tensor = self.norm(tokens)
        return normed
