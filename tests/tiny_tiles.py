"""Checkpoints of a few thousand random weights that cut pictures into tiles, and their answers."""

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
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tests.photographs import load_photographs
from tests.tiny_language import SPECIAL, TEMPLATE, rounded, write_checkpoint_words

SIDE, PATCH = 28, 7  # 16 patches
VIDEO = 300  # behind the words of the tiny tokenizer
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
MANY_PINPOINTS = [
    [SIDE * rows, SIDE * columns] for rows in (1, 2, 3, 4) for columns in (1, 2, 3, 4)
]
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
SIZES = ((30, 60), (61, 29), (60, 60), (100, 30), (30, 100), (45, 100), (100, 52), (47, 61))


def tiny_llava_next(family: str = "llama", **changes: Any) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT over a tiny tower, in numbers that float16 holds exactly."""
    torch.manual_seed(0)
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
    fields = {"image_grid_pinpoints": PINPOINTS, **_WORDS}
    config = LlavaNextConfig(vision_config=vision, text_config=_text(family), **fields | changes)
    return rounded(LlavaNextForConditionalGeneration(config))


def tiny_llava_onevision(**changes: Any) -> LlavaOnevisionForConditionalGeneration:
    """A LLaVA-OneVision of up to 16 tiles over a tiny SigLIP and Qwen2, as `tiny_llava_next`."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    fields = {"image_grid_pinpoints": MANY_PINPOINTS, "video_token_index": VIDEO, **_WORDS}
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=_text("qwen2"), **fields | changes
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.q_proj.weight.data *= 6  # attention far from uniform, as a trained one's
    return rounded(model)


_WORDS: dict[str, Any] = {
    "image_token_index": SPECIAL.index("<image>"),
    "tie_word_embeddings": False,
}


def _text(family: str) -> Any:
    return AutoConfig.for_model(
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


def write_tiled(root: Path, model: Any) -> Path:
    """Write a checkpoint as save_pretrained does, with tokenizer, template and processor."""
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(root, state_dict=half)
    write_checkpoint_words(root, model.config)
    if model.config.model_type == "llava_onevision":
        _write_clip_words(root, model.config.video_token_id)
    processor = _PROCESSORS[model.config.model_type]
    name = type(processor).__name__.removesuffix("Pil")
    fields = json.loads(processor.to_json_string()) | {"image_processor_type": name}
    (root / "preprocessor_config.json").write_text(json.dumps(fields))
    return root


def _write_clip_words(root: Path, video_token_id: int) -> None:
    """Give tokenizer and template a place for a clip, and say how its frames are prepared."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root)
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    tokenizer.save_pretrained(root)
    assert tokenizer.convert_tokens_to_ids("<video>") == video_token_id
    template = TEMPLATE.replace(
        "<image>\n{% else %}", "<image>\n{% elif c['type'] == 'video' %}<video>\n{% else %}"
    )
    (root / "chat_template.jinja").write_text(template)
    frames = {"size": {"height": SIDE, "width": SIDE}, "image_mean": MEAN, "image_std": STD}
    (root / "video_preprocessor_config.json").write_text(json.dumps(frames))


_PROCESSORS: dict[str, Any] = {
    "llava_next": LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=MEAN,
        image_std=STD,
    ),
    "llava_onevision": LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=MANY_PINPOINTS,
        image_mean=MEAN,
        image_std=STD,
    ),
}


def picture_of(height: int, width: int) -> np.ndarray[Any, Any]:
    """A part of a photograph, uint8[H, W, 3]."""
    photograph = Image.fromarray(load_photographs()["astronaut.png"])
    return np.asarray(photograph.resize((width, height)))


def image_processor(kind: str) -> Any:
    """transformers' image processor of a kind of checkpoint."""
    return _PROCESSORS[kind]


def processed(model: Any, picture: np.ndarray[Any, Any]) -> Any:
    """What transformers' image processor makes of a picture."""
    processor = _PROCESSORS[model.config.model_type]
    return processor(images=Image.fromarray(picture), return_tensors="pt")


@torch.no_grad()
def tokens_of(model: Any, picture: np.ndarray[Any, Any]) -> Any:
    """What transformers gives the language model of a picture, float32[N, D]."""
    given = processed(model, picture)
    seen = model.get_image_features(given["pixel_values"], given["image_sizes"])
    return seen.pooler_output[0].numpy()


@torch.no_grad()
def written_by(model: Any, picture: np.ndarray[Any, Any], ids: list[int], most: int) -> list[int]:
    """What transformers writes greedily, without the end token.

    Args:
        model: the reference.
        picture: uint8[H, W, 3].
        ids: of the prompt, one for the picture.
        most: tokens, at most.
    """
    config = model.config
    given, at = processed(model, picture), ids.index(config.image_token_id)
    ids = [*ids[:at], *ids[at : at + 1] * len(tokens_of(model, picture)), *ids[at + 1 :]]
    written = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=given["pixel_values"],
        image_sizes=given["image_sizes"],
        max_new_tokens=most,
        do_sample=False,
    )
    said = written[0, len(ids) :].tolist()
    return [one for one in said if one != config.text_config.eos_token_id]
