"""Adding a tower, step by step as docs/design.md says, tried with ViT: one function, one line."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from engines.ort import OrtSession
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.reducers import make_reducer
from export.towers import Scoring
from export.towers.encoder import EncoderTower
from export.towers.registry import TOWERS, TowerKind, make_tower
from export.vision.to_onnx import export_onnx
from export.vision.vision_module import build_vision_module
from tests.export.conftest import IMAGE_SIZE, PATCH, WORDS, write_checkpoint
from tests.photographs import clip_pixels


# What a contributor writes: export/towers/vit.py ...
def vit_tower(model: ViTModel, feature_layers: Sequence[int], scoring: Scoring) -> EncoderTower:
    layers = [with_clip_names(layer) for layer in model.layers]
    return EncoderTower(Embeddings(model.embeddings), layers, feature_layers, scoring, True)


def with_clip_names(layer: Any) -> SimpleNamespace:
    own = layer.attention
    attention = {name: getattr(own, name) for name in ("q_proj", "k_proj", "v_proj")}
    heads = own.config.num_attention_heads
    return SimpleNamespace(
        layer_norm1=layer.layernorm_before,
        self_attn=SimpleNamespace(num_heads=heads, out_proj=own.o_proj, **attention),
        layer_norm2=layer.layernorm_after,
        mlp=layer.mlp,
    )


class Embeddings(nn.Module):
    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.projection = embeddings.patch_embeddings.projection
        self.class_token = embeddings.cls_token
        self.positions = embeddings.position_embeddings

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.projection(pixel_values).flatten(2).transpose(1, 2)  # [B, P, D]
        first = self.class_token.expand(patches.shape[0], -1, -1)
        return torch.cat([first, patches], dim=1) + self.positions


# ... and one line in export/towers/registry.py.
VIT = TowerKind(vit_tower, class_token=True)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Checkpoint:
    monkeypatch.setitem(TOWERS, "vit", VIT)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    vision = ViTConfig(num_hidden_layers=4, image_size=IMAGE_SIZE, patch_size=PATCH, **sizes)
    text = LlamaConfig(vocab_size=len(WORDS), num_hidden_layers=2, **sizes)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=WORDS.index("<image>")
    )
    model = LlavaForConditionalGeneration(config).eval()
    return open_checkpoint(write_checkpoint(tmp_path / "llava", model, "transformers-5"))


def test_a_third_tower_gives_the_tokens_of_transformers(checkpoint, tmp_path) -> None:
    pixels = clip_pixels(IMAGE_SIZE)[:3]
    images = torch.from_numpy(pixels)
    with torch.no_grad():
        expected = torch.stack(checkpoint.llava().get_image_features(images).pooler_output)
    exported = export_onnx(build_vision_module(checkpoint, make_reducer("none")), tmp_path / "all")
    with OrtSession(exported.file, threads=1) as session:
        out = session.run({"pixel_values": pixels})
    np.testing.assert_allclose(out["visual_tokens"], expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "scope"])
def test_reducers_take_a_third_tower(checkpoint, tmp_path, name) -> None:
    pixels = clip_pixels(IMAGE_SIZE)[:3]
    model: Any = checkpoint.vision_model()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(torch.from_numpy(pixels), output_attentions=True).attentions
        seen = make_tower(model, (3,), Scoring.SELECTED_LAYER)(torch.from_numpy(pixels))
    torch.testing.assert_close(seen.scores, attention[2][:, :, 0, 1:].sum(dim=1))
    options = {"dominant": 14, "contextual": 2} if name == "visionzip" else {"budget": 16}
    graph = build_vision_module(checkpoint, make_reducer(name, **options))
    exported = export_onnx(graph, tmp_path / "some")
    with OrtSession(exported.file, threads=1) as session:
        out = session.run({"pixel_values": pixels})
    with torch.no_grad():
        tokens, valid, *_ = graph(torch.from_numpy(pixels))
    assert out["valid_count"].tolist() == valid.tolist()
    np.testing.assert_allclose(out["visual_tokens"], tokens.numpy(), atol=1e-4)
