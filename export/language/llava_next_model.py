"""Write a LLaVA checkpoint as the LLaVA-NeXT that a TensorRT-LLM server takes.

`trtllm-serve` puts visual tokens from outside into a prompt for some models only, and of the LLaVA
family for LLaVA-NeXT (`tensorrt_llm/_torch/models/modeling_llava_next.py`). Its language model is
that of any LLaVA. The server also loads a tower and a projector, which it never runs for us, so the
checkpoint's own go along.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextConfig

from engines.errors import CheckpointError
from engines.picture_tiles import NEWLINE
from export.checkpoint.llava import Checkpoint
from export.checkpoint.weights import LLAVA_PARTS, Part, stored_name, write_shards

OPTIONS_FILE = "trtllm_options.yaml"
_OPTIONS = """\
# Blocks of the KV cache are looked up by token ids, which are the same for every picture.
kv_cache_config:
  enable_block_reuse: false
# --choices and --json-schema need one.
guided_decoding_backend: xgrammar
"""
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
"""A chat template that hands on the prompt the robot has written, with `<image>` in its places."""


def write_llava_next(checkpoint: Checkpoint, directory: Path) -> None:
    """Write the whole checkpoint as a LLaVA-NeXT; memory holds one shard at a time.

    Args:
        checkpoint: an opened LLaVA checkpoint.
        directory: where to write; it exists.

    Raises:
        CheckpointError: its tower is no CLIP, its projector is not LLaVA's, or a tensor is missing,
            too many, has another shape or is not finite.
    """
    _refuse_other_vision(checkpoint)
    for part in checkpoint.kind.parts:
        checkpoint.check(part)
    _config(checkpoint).save_pretrained(directory)
    for file in (*checkpoint.tokenizer_files(), checkpoint.root / "generation_config.json"):
        if file.is_file():
            shutil.copy2(file, directory / file.name)
    (directory / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    (directory / OPTIONS_FILE).write_text(_OPTIONS, "utf-8")
    for name, fields in _processor_files(checkpoint).items():
        (directory / name).write_text(json.dumps(fields, indent=1), "utf-8")
    write_shards(_shards(checkpoint), directory)


def _refuse_other_vision(checkpoint: Checkpoint) -> None:
    """Refuse a tower or a projector that the server's LLaVA-NeXT has no place for."""
    problems = []
    kind = checkpoint.vision_config.model_type
    if kind != "clip_vision_model":
        problems.append(f"the vision tower is {kind!r}, expected 'clip_vision_model'")
    made_of = {name.split(".")[0] for name in checkpoint.weights.names(Part.PROJECTOR)}
    if len(checkpoint.feature_layers) > 1 or not made_of <= {"linear_1", "linear_2"}:
        problems.append(
            f"the projector is made of {', '.join(sorted(made_of))} and reads features of "
            f"{len(checkpoint.feature_layers)} layers, expected linear_1 and linear_2 over one"
        )
    if problems:
        raise CheckpointError(
            f"{checkpoint.root}: TensorRT-LLM cannot load it as a LLaVA-NeXT, although tower and "
            f"projector stay on the robot: {'; '.join(problems)}. Serve the language model with "
            "vLLM: --server vllm."
        )


def _config(checkpoint: Checkpoint) -> LlavaNextConfig:
    ours: Any = checkpoint.config
    text = checkpoint.plain_text_config()
    side = checkpoint.image_size
    config = LlavaNextConfig(
        vision_config=checkpoint.vision_config,
        text_config=text,
        image_token_index=int(ours.image_token_id),
        projector_hidden_act=ours.projector_hidden_act,
        multimodal_projector_bias=ours.multimodal_projector_bias,
        vision_feature_select_strategy=ours.vision_feature_select_strategy,
        vision_feature_layer=ours.vision_feature_layer,
        image_grid_pinpoints=[[side, side]],
        image_seq_length=checkpoint.patch_side**2,
        tie_word_embeddings=bool(ours.tie_word_embeddings),
    )
    config.architectures = ["LlavaNextForConditionalGeneration"]
    config.dtype = text.dtype
    return config


def _processor_files(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return what LLaVA-NeXT's processor is made of, by file; the server opens it."""
    side, pixels = checkpoint.image_size, checkpoint.preprocessing
    pictures = {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_grid_pinpoints": [[side, side]],
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "rescale_factor": pixels.rescale_factor,
    }
    words = {
        "processor_class": "LlavaNextProcessor",
        "patch_size": side // checkpoint.patch_side,
        "vision_feature_select_strategy": checkpoint.config.vision_feature_select_strategy,
        "image_token": checkpoint.prompt("tokenizer.json").image_token,
        "num_additional_image_tokens": 1,
    }
    return {"preprocessor_config.json": pictures, "processor_config.json": words}


def _shards(checkpoint: Checkpoint) -> Iterator[dict[str, Tensor]]:
    dtype = checkpoint.embedding_table().dtype
    for part in LLAVA_PARTS:
        for shard in checkpoint.weights.read_by_shard(part):
            yield {stored_name(part, name): tensor for name, tensor in shard.items()}
    width = int(checkpoint.plain_text_config().hidden_size)
    yield {NEWLINE: torch.zeros(width, dtype=dtype)}  # between the tiles of a picture: we send none
