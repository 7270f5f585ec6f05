"""The encoder of a vision transformer with fused attention and what a reducer wants to know of it.

The papers' code asks every layer for its attention matrix; here no layer makes one. What a reducer
needs is computed from the queries and keys of one layer. Layers after the last one read do not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.errors import OptionError
from export.towers import Scoring, TowerOutput, without_scores
from export.towers.scores import LastLayerScores, SelectedLayerScores


class EncoderTower(nn.Module):
    """An encoder up to the deepest feature layer, with the scores and keys one reducer wants.

    The features of several layers lie side by side in the width of a token, in the order given.
    Scores and keys are of one layer: the deepest of them, where LLaVA reads its features.

    Args:
        embeddings: pixels -> float[B, S, D].
        layers: the encoder layers of transformers' model; weights are shared, not copied.
        feature_layers: how many of them run before features are taken, once or several times.
        scoring: whose attention row and keys to compute.
        class_token: whether the first of the S positions is one.

    Raises:
        OptionError: a feature layer is not one of the tower's, or there is none.
    """

    def __init__(
        self,
        embeddings: nn.Module,
        layers: Sequence[Any],
        feature_layers: Sequence[int],
        scoring: Scoring,
        class_token: bool,
    ) -> None:
        super().__init__()
        if not feature_layers or not all(1 <= one <= len(layers) for one in feature_layers):
            raise OptionError(
                f"feature layers {list(feature_layers)} of a tower with {len(layers)} layers: "
                f"expected one or several of 1 to {len(layers)}."
            )
        self.feature_layers = tuple(feature_layers)
        self.deepest = max(feature_layers)
        self.scoring = scoring
        self.class_token = class_token
        self.before_last = len(layers) - 1
        depth = self.deepest
        if scoring is Scoring.LAST_LAYER:
            depth = max(depth, self.before_last)
        self.embeddings = embeddings
        self.layers = nn.ModuleList(EncoderLayer(layer) for layer in layers[:depth])
        if scoring is Scoring.SELECTED_LAYER:
            scored = layers[self.deepest - 1].self_attn
            self.scores: nn.Module = SelectedLayerScores(scored, class_token)
        elif scoring is Scoring.LAST_LAYER:
            self.scores = LastLayerScores(layers[-1], class_token)

    def forward(self, pixel_values: Tensor) -> TowerOutput:
        """Run a batch of pictures, float32[B, 3, H, W]."""
        states = [self.embeddings(pixel_values)]  # each [B, S, D]
        projections = []
        for layer in self.layers:
            hidden, queries, keys = layer(states[-1])
            states.append(hidden)
            projections.append((queries, keys))
        read = torch.cat([states[one] for one in self.feature_layers], dim=-1)  # [B, S, D x L]
        features, class_token = (read[:, 1:], read[:, :1]) if self.class_token else (read, None)
        if self.scoring is Scoring.NONE:
            return without_scores(features, class_token)
        if self.scoring is Scoring.SELECTED_LAYER:
            scores, keys = self.scores(*projections[self.deepest - 1])
        else:
            scores, keys = self.scores(states[self.before_last])
        return TowerOutput(features, scores, keys, class_token)


class EncoderLayer(nn.Module):
    """One encoder layer; beside its output it returns the queries and keys it made.

    Args:
        layer: an encoder layer of transformers' CLIP or SigLIP, or what has the same names:
            ``layer_norm1``, ``self_attn`` (``num_heads``, ``q_proj``, ``k_proj``, ``v_proj``,
            ``out_proj``), ``layer_norm2`` and ``mlp``.
    """

    def __init__(self, layer: Any) -> None:
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

    def __init__(self, attention: Any) -> None:
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
