"""How much attention each patch received, and the keys that patches are compared by.

A tower with a class token asks for one row of attention: what that token looks at. A tower without
one has no such row; there a patch's score is what all patches give it on the mean, which is what
VisionZip does with such towers (arXiv 2412.04467, section 3.2).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class SelectedLayerScores(nn.Module):
    """VisionZip: the attention of the layer whose output is read, and the mean of its heads' keys.

    Args:
        attention: its `self_attn`.
        class_token: whether the first position is one.
    """

    def __init__(self, attention: Any, class_token: bool) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.class_token = class_token

    def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Score patches.

        Args:
            queries: float[B, S, D], projected and flat.
            keys: float[B, S, D], projected and flat.

        Returns:
            scores: float32[B, P]; softmax over all S positions, summed over heads.
            keys: float32[B, P, d]; mean over heads.
        """
        first = int(self.class_token)
        batch, positions, width = keys.shape
        head_width = width // self.heads
        asking = queries[:, :1] if self.class_token else queries  # [B, R, D]
        q = asking.float().view(batch, -1, self.heads, head_width).transpose(1, 2)  # [B, H, R, d]
        k = keys.float().view(batch, positions, self.heads, head_width)  # [B, S, H, d]
        logits = (q * head_width**-0.5) @ k.permute(0, 2, 3, 1)  # [B, H, R, S]
        received = logits.softmax(dim=-1)[..., first:].sum(dim=(1, 2))  # [B, P]
        return _mean(received, self.class_token), k.mean(dim=2)[:, first:]


class LastLayerScores(nn.Module):
    """PruMerge: the last layer's projections at full width, as if it had a single head.

    Args:
        layer: the last encoder layer of transformers' model.
        class_token: whether the first position is one.
    """

    def __init__(self, layer: Any, class_token: bool) -> None:
        super().__init__()
        self.norm = layer.layer_norm1
        self.q_proj = layer.self_attn.q_proj
        self.k_proj = layer.self_attn.k_proj
        self.class_token = class_token

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Score patches.

        Args:
            hidden: float[B, S, D], what enters the last layer.

        Returns:
            scores: float32[B, P]; softmax over all S positions.
            keys: float32[B, P, D].
        """
        first = int(self.class_token)
        x = self.norm(hidden)
        query = self.q_proj(x[:, :1] if self.class_token else x).float()  # [B, R, D]
        keys = self.k_proj(x).float()  # [B, S, D]
        logits = (query * query.shape[-1] ** -0.5) @ keys.transpose(1, 2)  # [B, R, S]
        received = logits.softmax(dim=-1)[..., first:].sum(dim=1)  # [B, P]
        return _mean(received, self.class_token), keys[:, first:]


def _mean(received: Tensor, class_token: bool) -> Tensor:
    """Divide what P patches gave together by P; one class token gave its own."""
    return received if class_token else received / received.shape[1]
