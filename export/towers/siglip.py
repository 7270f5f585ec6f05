"""The SigLIP vision tower, of SigLIP 2 too where its pictures have a fixed size.

It has no class token. Its attention-pooling head describes a whole picture, so it stays out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from export.towers import Scoring
from export.towers.encoder import EncoderTower


def siglip_tower(
    model: SiglipVisionModel, feature_layers: Sequence[int], scoring: Scoring
) -> EncoderTower:
    """Make the tower of a SigLIP that transformers loaded; see `EncoderTower`.

    Raises:
        OptionError: a feature layer is not one of the tower's, or there is none.
    """
    inner = getattr(model, "vision_model", model)
    embeddings = PatchEmbeddings(inner.embeddings)
    return EncoderTower(
        embeddings, list(inner.encoder.layers), feature_layers, scoring, class_token=False
    )


class PatchEmbeddings(nn.Module):
    """Pixels -> one token per patch, with positions."""

    def __init__(self, embeddings: SiglipVisionEmbeddings) -> None:
        super().__init__()
        self.patch_embedding = embeddings.patch_embedding
        self.position_embedding = embeddings.position_embedding.weight

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return float32[B, P, D]."""
        patches: Tensor = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + self.position_embedding
