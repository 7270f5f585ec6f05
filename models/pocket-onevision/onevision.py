"""The model: LLaVA-OneVision's architecture at a hundredth of the size.

A seed enters; `LlavaOnevisionForConditionalGeneration` with random weights leaves, and the forward
passes that training needs: the tower with the attention of the layer read last, and visual tokens
in the order in which transformers puts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paths  # noqa: F401 - makes pocket-llava's modules importable

import torch  # isort: skip
from architecture import HIDDEN_SIZE, LLM_SETTINGS, TOWER_HEADS, TOWER_LAYERS
from layout import PATCH_SIZE
from signs import TILE_SIZE
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from vocabulary import IMAGE, VIDEO, list_words

TILE_GRID = TILE_SIZE // PATCH_SIZE
TILE_PATCHES = TILE_GRID**2
TILES = 4  # of a picture of 192 x 192, besides the whole picture at the size of a tile
KEY_VALUE_HEADS = 2
PINPOINTS = [
    [TILE_SIZE * rows, TILE_SIZE * columns] for rows, columns in ((1, 1), (1, 2), (2, 1), (2, 2))
]
VIEWS_TOKENS = TILE_PATCHES + 2 * TILE_GRID * (2 * TILE_GRID + 1)  # base, then rows with newlines


def build_config() -> LlavaOnevisionConfig:
    """Return the configuration that is saved with the checkpoint."""
    tower = SiglipVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=TOWER_HEADS,
        image_size=TILE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    llm = Qwen2Config(**LLM_SETTINGS, num_key_value_heads=KEY_VALUE_HEADS)
    return LlavaOnevisionConfig(
        vision_config=tower,
        text_config=llm,
        image_token_index=list_words().index(IMAGE),
        video_token_index=list_words().index(VIDEO),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=True,
    )


def build_model(seed: int) -> LlavaOnevisionForConditionalGeneration:
    """Build the model with random weights that depend on the seed only."""
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(build_config())
    model.set_attn_implementation("plain")
    return model


@dataclass(frozen=True)
class TileLook:
    """What the tower made of a batch of tiles.

    Attributes:
        features: float32[B, P, D], the last layer's output, which LLaVA-OneVision reads.
        received: float32[B, P], the attention that each patch receives in that layer from all
            patches, on the mean over patches and heads.
    """

    features: Tensor
    received: Tensor


def look(tower: Any, pixels: Tensor) -> TileLook:
    """Run the tower on normalised pixels, float32[B, 3, 96, 96]."""
    hidden = tower.embeddings(pixels)
    layers = tower.encoder.layers
    for layer in layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    last = layers[-1]
    normed = last.layer_norm1(hidden)
    heads = (*normed.shape[:2], TOWER_HEADS, -1)
    query = last.self_attn.q_proj(normed).view(heads).transpose(1, 2)
    keys = last.self_attn.k_proj(normed).view(heads).transpose(1, 2)
    scores = (query @ keys.transpose(-1, -2)).float() / query.shape[-1] ** 0.5
    received = scores.softmax(-1).mean((1, 2))
    return TileLook(last(hidden, attention_mask=None).float(), received)


def normalise(images: Tensor) -> Tensor:
    """Return float32[B, 3, H, W] between -1 and 1 of uint8[B, H, W, 3] pictures."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def cut_views(images: Tensor, bases: Tensor) -> Tensor:
    """Return uint8[B, 5, 96, 96, 3]: the whole picture made small, then its tiles in reading order.

    Args:
        images: uint8[B, 192, 192, 3].
        bases: uint8[B, 96, 96, 3], see `pictures.shrink`.
    """
    tiles = images.unflatten(1, (2, TILE_SIZE)).unflatten(3, (2, TILE_SIZE))
    tiles = tiles.transpose(2, 3).flatten(1, 2)  # [B, 4, 96, 96, 3]
    return torch.cat([bases[:, None], tiles], 1)


def order_views(features: Tensor) -> Tensor:
    """Put a picture's features in the order of its tokens, newlines aside.

    Args:
        features: [B, 5, P, D], of the views that `cut_views` returned.

    Returns:
        [B, 5 * P, D]: those of the base, then those of the tiles row by row of the picture.
    """
    tiles = features[:, 1:].unflatten(1, (2, 2)).unflatten(3, (TILE_GRID, TILE_GRID))
    rows = tiles.transpose(2, 3).flatten(1, 4)  # tile row, row, tile column, column
    return torch.cat([features[:, 0], rows], 1)


def place_newlines() -> Tensor:
    """Return int64[VIEWS_TOKENS]: where each token comes from in `order_views`, -1 for newlines."""
    rows = torch.arange(4 * TILE_PATCHES).view(2 * TILE_GRID, 2 * TILE_GRID) + TILE_PATCHES
    ended = torch.cat([rows, torch.full((2 * TILE_GRID, 1), -1)], 1)
    return torch.cat([torch.arange(TILE_PATCHES), ended.flatten()])


def picture_tokens(
    model: LlavaOnevisionForConditionalGeneration, features: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Return a picture's visual tokens, float32[B, N, D].

    Args:
        model: the whole model; its tower is not used.
        features: float32[B, 5 * P, D], see `order_views`.
        kept: int64[B, N], which of the VIEWS_TOKENS tokens to keep; all of them by default.
    """
    source = place_newlines()
    places = source.expand(len(features), -1) if kept is None else source[kept]
    chosen = features.gather(1, places.clamp(min=0)[..., None].expand(-1, -1, features.shape[-1]))
    visual = model.model.multi_modal_projector(chosen)
    newline = model.model.image_newline.to(visual.dtype)
    return torch.where((places < 0)[..., None], newline, visual)


def clip_tokens(
    model: LlavaOnevisionForConditionalGeneration, features: Tensor, kept: Tensor | None = None
) -> Tensor:
    """Return a clip's visual tokens, float32[B, N, D], the last of all of them a newline.

    Args:
        model: the whole model; its tower is not used.
        features: float32[B, F, P, D] of its frames.
        kept: int64[B, N], which of the tokens to keep; all of them by default.
    """
    visual = model.model.multi_modal_projector(features)
    plane = visual.flatten(0, 1).unflatten(1, (TILE_GRID, TILE_GRID)).permute(0, 3, 1, 2)
    pooled = functional.avg_pool2d(plane, 2).flatten(2).transpose(1, 2)  # bilinear, halved
    tokens = pooled.reshape(len(features), -1, pooled.shape[-1])
    newline = model.model.image_newline.to(tokens.dtype).expand(len(tokens), 1, -1)
    whole = torch.cat([tokens, newline], 1)
    if kept is None:
        return whole
    return whole.gather(1, kept[..., None].expand(-1, -1, whole.shape[-1]))


def trained_by_language(model: LlavaOnevisionForConditionalGeneration) -> nn.Module:
    """Return what the language stage trains: projector, newline and language model."""
    part = nn.Module()
    part.projector = model.model.multi_modal_projector
    part.llm = model.model.language_model
    part.newline = model.model.image_newline
    return part
