"""What the papers' released code does, in plain PyTorch: the thing Foveate is compared with.

transformers in eager mode with the attention matrices of all layers kept, keys taken by a hook, and
then the reduction by indexing, picture by picture where the released code does so. It shares
nothing with `export/`, so it serves as the reference of the parity tests and of the benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel

NEIGHBOURS = 32


@dataclass(frozen=True)
class TowerRun:
    """Everything the papers read of a CLIP tower.

    Attributes:
        features: float32[B, 1+P, D] of the selected layer.
        attention: float32[B, H, S, S] of the selected layer.
        keys: float32[B, S, D], `k_proj` of the selected layer.
        last_queries: float32[B, S, D], `q_proj` of the last layer.
        last_keys: float32[B, S, D], `k_proj` of the last layer.
    """

    features: Tensor
    attention: Tensor
    keys: Tensor
    last_queries: Tensor
    last_keys: Tensor


def run_tower(model: CLIPVisionModel, pixel_values: Tensor, layer: int = -2) -> TowerRun:
    """Run all layers, keeping all attention matrices and hidden states."""
    model.set_attn_implementation("eager")
    layers: Any = getattr(model, "vision_model", model).encoder.layers
    selected = layer - 1 if layer > 0 else layer
    watched = {
        "keys": layers[selected].self_attn.k_proj,
        "last_queries": layers[-1].self_attn.q_proj,
        "last_keys": layers[-1].self_attn.k_proj,
    }
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _m, _i, out: seen.__setitem__(name, out))

    handles = [watch(name, module) for name, module in watched.items()]
    try:
        with torch.inference_mode():
            out = model(pixel_values, output_attentions=True, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    return TowerRun(out.hidden_states[layer], out.attentions[selected], **seen)


def visionzip(
    run: TowerRun, dominant: int, contextual: int, merge: str = "mean"
) -> tuple[Tensor, list[list[int]]]:
    """Return VisionZip's tokens, float32[B, N, D], and the patches kept (class token left out)."""
    batch, heads, positions, _ = run.attention.shape
    head_keys = run.keys.view(batch, positions, heads, -1).mean(dim=2)  # [B, S, d]
    scores = run.attention[:, :, 0, 1:].sum(dim=1)  # [B, P]
    kept_patches, pictures = [], []
    for number in range(batch):
        best = scores[number].topk(dominant - 1).indices.sort().values
        kept_patches.append(best.tolist())
        kept = torch.cat([best.new_zeros(1), best + 1])
        left = _all_of(best, positions)
        left[kept] = False
        rest = run.features[number][left]  # [M, D]
        keys = head_keys[number][left]
        keys = keys / keys.norm(dim=-1, keepdim=True)
        step = max(1, len(rest) // contextual)
        targets = torch.arange(0, len(rest), step, device=rest.device)[:contextual]
        free = _all_of(rest, len(rest))
        free[targets] = False
        nearest = (keys[free] @ keys[targets].T).argmax(dim=1)
        merged = []
        for slot, target in enumerate(targets.tolist()):
            joined = rest[free][nearest == slot]
            if merge == "mean":
                merged.append(torch.cat([rest[target][None], joined]).mean(dim=0))
            else:
                merged.append(rest[target] + (joined.mean(dim=0) if len(joined) else 0.0))
        pictures.append(torch.cat([run.features[number][kept], torch.stack(merged)]))
    return torch.stack(pictures), kept_patches


def prumerge(run: TowerRun, plus: bool = False) -> tuple[list[Tensor], list[list[int]]]:
    """Return PruMerge's tokens, one float32[N, D] for each picture, and the patches kept."""
    query = run.last_queries[:, :1]
    logits = query @ run.last_keys.transpose(1, 2) * run.last_keys.shape[-1] ** -0.5
    attention = logits.softmax(dim=-1)[:, 0, 1:]  # [B, P]
    tokens, kept_patches = [], []
    for number, a in enumerate(attention):
        first, third = torch.quantile(a, a.new_tensor([0.25, 0.75]))
        outliers = int((a > third + 1.5 * (third - first)).sum())
        kept = a.topk(outliers).indices.tolist()
        if plus:
            step = max(1, len(a) // max(1, outliers) // 3)
            kept += [p for p in range(0, len(a) - 1, step) if p not in set(kept)]
        x = run.features[number, 1:]  # [P, D]
        keys = run.last_keys[number, 1:]
        keys = keys / keys.norm(dim=-1, keepdim=True)
        rows = []
        for patch in kept:
            similarity = keys @ keys[patch]
            similarity[patch] = -torch.inf
            near = similarity.topk(NEIGHBOURS).indices
            rows.append(x[patch] + a[near] @ x[near])
        pruned = _all_of(a, len(a))
        pruned[kept] = False
        rows.append(a[pruned] @ x[pruned])
        tokens.append(torch.stack(rows))
        kept_patches.append(kept)
    return tokens, kept_patches


def _all_of(like: Tensor, length: int) -> Tensor:
    """Return bool[length], all true, where ``like`` is."""
    return torch.ones(length, dtype=torch.bool, device=like.device)
