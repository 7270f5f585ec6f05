"""A LLaVA-NeXT checkpoint of a few thousand random weights, and what transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from tests.photographs import load_photographs
from tests.tiny_language import SPECIAL, write_checkpoint_words

SIDE, PATCH = 28, 7  # 16 patches
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
SIZES = ((30, 60), (61, 29), (60, 60), (100, 30), (30, 100), (45, 100), (100, 52), (47, 61))


def tiny_llava_next(family: str = "llama", **changes: Any) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT over a tiny tower, in numbers that float16 holds exactly."""
    torch.manual_seed(0)
    text = AutoConfig.for_model(
        family,
        vocab_size=304,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **({"sliding_window": None} if family == "mistral" else {}),
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
        initializer_factor=3.0,
    )
    fields: dict[str, Any] = {
        "image_token_index": SPECIAL.index("<image>"),
        "image_grid_pinpoints": PINPOINTS,
        "tie_word_embeddings": False,
    }
    config = LlavaNextConfig(vision_config=vision, text_config=text, **fields | changes)
    model = LlavaNextForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model


def write_llava_next(root: Path, model: LlavaNextForConditionalGeneration) -> Path:
    """Write a checkpoint as save_pretrained does, with tokenizer, template and processor."""
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(root, state_dict=half)
    write_checkpoint_words(root, model.config)
    processor = {
        "image_processor_type": "LlavaNextImageProcessor",
        "aspect_ratio_setting": "anyres",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_pad": True,
        "image_grid_pinpoints": PINPOINTS,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (root / "preprocessor_config.json").write_text(json.dumps(processor))
    return root


def picture_of(height: int, width: int) -> np.ndarray[Any, Any]:
    """A part of a photograph, uint8[H, W, 3]."""
    photograph = Image.fromarray(load_photographs()["astronaut.png"])
    return np.asarray(photograph.resize((width, height)))


def processed(picture: np.ndarray[Any, Any]) -> Any:
    """What transformers' image processor makes of a picture."""
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=MEAN,
        image_std=STD,
    )
    return processor(images=Image.fromarray(picture), return_tensors="pt")


@torch.no_grad()
def tokens_of(model: LlavaNextForConditionalGeneration, picture: np.ndarray[Any, Any]) -> Any:
    """What transformers gives the language model of a picture, float32[N, D]."""
    given = processed(picture)
    seen = model.get_image_features(given["pixel_values"], given["image_sizes"])
    return seen.pooler_output[0].numpy()
