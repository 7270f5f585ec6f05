"""Write a LLaVA checkpoint with a random language model of a given shape, and bundles of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The size of a Llama; left as it is, TinyLlama's 1.1 billion weights.

    Attributes:
        hidden_size: D.
        intermediate_size: of the feed-forward layers.
        layers: how many.
        heads: attention heads, 64 wide at TinyLlama's size.
        key_value_heads: heads of the KV cache.
        vocabulary: token ids.
    """

    hidden_size: int = 2048
    intermediate_size: int = 5632
    layers: int = 22
    heads: int = 32
    key_value_heads: int = 4
    vocabulary: int = 32000


def write_random_bundle(directory: Path, shape: Shape) -> Path:
    """Write a checkpoint with random weights and a bundle of it; return the bundle.

    The decoder of `bundle` is INT4, beside it that of `bundle-int8` is INT8.
    """
    import torch
    from tokenizers import Tokenizer, models
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

    from export.build import build_bundle
    from export.build.plan import BuildOptions
    from export.language.language_models import DecoderOptions

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.hidden_size // shape.heads,
        max_position_embeddings=2048,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        projection_dim=16,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
    checkpoint = directory / "checkpoint"
    torch.set_default_dtype(torch.float16)
    try:
        LlavaForConditionalGeneration(config).save_pretrained(checkpoint)
    finally:
        torch.set_default_dtype(torch.float32)
    words = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", "<image>"))}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    ).save_pretrained(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    size = {"height": 28, "width": 28}
    processor: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": size}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    kind = {"image_processor_type": "CLIPImageProcessor"}
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(processor | kind))
    build_bundle(
        BuildOptions(
            str(checkpoint),
            directory / "bundle",
            tokens=(8,),
            decoders=DecoderOptions(("ort", "llamacpp", "openvino")),
        )
    )
    build_bundle(
        BuildOptions(
            str(checkpoint),
            directory / "bundle-int8",
            tokens=(8,),
            decoders=DecoderOptions(("openvino",), "int8"),
        )
    )
    return directory / "bundle"
