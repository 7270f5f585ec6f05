"""The CLIP vision tower with fused attention and the class token's attention row.

The papers' code asks every layer for its attention matrix; here no layer makes one. The row that a
reducer needs is one query against the keys of one layer. Layers after the last one read do not run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPVisionEmbeddings,
)

from engines.errors import OptionError
from export.towers import Scoring, TowerOutput


class ClipTower(nn.Module):
    """CLIP up to the feature layer, with the scores and keys one reducer wants.

    Args:
        model: the tower as transformers loads it; its weights are shared, not copied.
        feature_layer: how many encoder layers run before the features are taken.
        scoring: whose attention row and keys to compute.

    Raises:
        OptionError: the feature layer is not one of the tower's.
    """

    def __init__(self, model: CLIPVisionModel, feature_layer: int, scoring: Scoring) -> None:
        super().__init__()
        # Older releases of transformers wrap the transformer once more.
        inner = getattr(model, "vision_model", model)
        layers = list(inner.encoder.layers)
        if not 1 <= feature_layer <= len(layers):
            raise OptionError(
                f"feature layer {feature_layer} of a CLIP tower with {len(layers)} layers: "
                f"expected 1 to {len(layers)}."
            )
        self.feature_layer = feature_layer
        self.scoring = scoring
        self.before_last = len(layers) - 1
        depth = feature_layer
        if scoring is Scoring.LAST_LAYER:
            depth = max(depth, self.before_last)
        self.embeddings = PatchEmbeddings(inner.embeddings, inner.pre_layrnorm)
        self.layers = nn.ModuleList(ClipLayer(layer) for layer in layers[:depth])
        if scoring is Scoring.SELECTED_LAYER:
            self.scores: nn.Module = SelectedLayerScores(layers[feature_layer - 1].self_attn)
        elif scoring is Scoring.LAST_LAYER:
            self.scores = LastLayerScores(layers[-1])

    def forward(self, pixel_values: Tensor) -> TowerOutput:
        """Run a batch of pictures, float32[B, 3, H, W]."""
        states = [self.embeddings(pixel_values)]  # each [B, S, D]
        projections = []
        for layer in self.layers:
            hidden, queries, keys = layer(states[-1])
            states.append(hidden)
            projections.append((queries, keys))
        features = states[self.feature_layer]
        if self.scoring is Scoring.SELECTED_LAYER:
            return TowerOutput(features, *self.scores(*projections[self.feature_layer - 1]))
        if self.scoring is Scoring.LAST_LAYER:
            return TowerOutput(features, *self.scores(states[self.before_last]))
        return TowerOutput(features, features[:, :0, 0], features[:, :, :0])


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


class ClipLayer(nn.Module):
    """One encoder layer; beside its output it returns the queries and keys it made."""

    def __init__(self, layer: CLIPEncoderLayer) -> None:
        super().__init__()
        self.norm1 = layer.layer_norm1
        self.attention = Attention(layer.self_attn)
        self.norm2 = layer.layer_norm2
        self.mlp = layer.mlp

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states and the flat queries and keys, each float32[B, S, D]."""
        attended, queries, keys = self.attention(self.norm1(hidden))
        hidden = hidden + attended
        return hidden + self.mlp(self.norm2(hidden)), queries, keys


class Attention(nn.Module):
    """Multi-head attention that leaves its matrix to a fused kernel."""

    def __init__(self, attention: CLIPAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.q_proj = attention.q_proj
        self.k_proj = attention.k_proj
        self.v_proj = attention.v_proj
        self.out_proj = attention.out_proj

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output and the flat queries and keys, each float32[B, S, D]."""
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        batch, positions, width = x.shape
        heads = (batch, positions, self.heads, width // self.heads)
        q, k, v = (t.view(heads).transpose(1, 2) for t in (queries, keys, values))  # [B, H, S, d]
        attended = F.scaled_dot_product_attention(q, k, v)  # [B, H, S, d]
        return self.out_proj(attended.transpose(1, 2).flatten(2)), queries, keys


class SelectedLayerScores(nn.Module):
    """VisionZip: the class token's row of the selected layer, and the mean of its heads' keys."""

    def __init__(self, attention: CLIPAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads

    def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Score patches.

        Args:
            queries: float[B, S, D], projected and flat.
            keys: float[B, S, D], projected and flat.

        Returns:
            scores: float32[B, P]; softmax over all S positions, summed over heads.
            keys: float32[B, S, d]; mean over heads.
        """
        batch, positions, width = keys.shape
        head_width = width // self.heads
        q = queries[:, :1].float().view(batch, self.heads, 1, head_width)  # [B, H, 1, d]
        k = keys.float().view(batch, positions, self.heads, head_width)  # [B, S, H, d]
        logits = (q * head_width**-0.5) @ k.permute(0, 2, 3, 1)  # [B, H, 1, S]
        return logits.softmax(dim=-1)[..., 1:].sum(dim=(1, 2)), k.mean(dim=2)


class LastLayerScores(nn.Module):
    """PruMerge: the last layer's projections at full width, as if it had a single head."""

    def __init__(self, layer: CLIPEncoderLayer) -> None:
        super().__init__()
        self.norm = layer.layer_norm1
        self.q_proj = layer.self_attn.q_proj
        self.k_proj = layer.self_attn.k_proj

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Score patches.

        Args:
            hidden: float[B, S, D], what enters the last layer.

        Returns:
            scores: float32[B, P]; softmax over all S positions.
            keys: float32[B, S, D].
        """
        x = self.norm(hidden)
        query = self.q_proj(x[:, :1]).float()  # [B, 1, D]
        keys = self.k_proj(x).float()  # [B, S, D]
        logits = (query * query.shape[-1] ** -0.5) @ keys.transpose(1, 2)  # [B, 1, S]
        return logits.softmax(dim=-1)[:, 0, 1:], keys
