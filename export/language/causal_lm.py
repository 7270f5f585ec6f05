"""Write the language model alone, as a causal-LM checkpoint for the model builder.

The builder finds the head by its row count alone. A vocabulary as wide as another layer would give
wrong answers without an error, so such a vocabulary is padded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.checkpoint.llava import Checkpoint

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROTARY_KINDS = ("default", "llama3")
_HEAD_SIZE_STEP = 16
_PADDING_ROWS = 8
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_limits(config: Any) -> list[str]:
    """Return why a language model cannot become a decoder; nothing when it can."""
    problems = []
    if config.model_type not in _FAMILIES:
        problems.append(f"model_type is {config.model_type!r}, not one of {', '.join(_FAMILIES)}")
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in _ROTARY_KINDS:
        problems.append(f"rope_type is {rotary!r}, not one of {', '.join(_ROTARY_KINDS)}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        problems.append("some layers attend to a sliding window, which rewinding would break")
    if head_size(config) % _HEAD_SIZE_STEP:
        problems.append(
            f"its attention heads are {head_size(config)} wide, and ONNX Runtime's grouped-query "
            f"attention takes multiples of {_HEAD_SIZE_STEP}"
        )
    return problems


def write_causal_lm(checkpoint: Checkpoint, directory: Path) -> None:
    """Write the plain language model's configuration and tokenizer, for the builder to read.

    The vocabulary is padded until it is unlike any other width; `padded` does it to the weights.
    """
    checkpoint.write_language_config(directory)
    config: Any = checkpoint.text_config
    rows = config.vocab_size
    while rows in layer_widths(config):
        rows += _PADDING_ROWS
    if rows != config.vocab_size:
        file = directory / "config.json"
        fields = json.loads(file.read_text("utf-8")) | {"vocab_size": rows}
        file.write_text(json.dumps(fields, indent=2), "utf-8")


def head_size(config: Any) -> int:
    """Return the width of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def layer_widths(config: Any) -> set[int]:
    """Return the output widths of the decoder's linear layers, the head's aside."""
    size = head_size(config)
    heads = {config.num_attention_heads * size, config.num_key_value_heads * size}
    return heads | {config.hidden_size, config.intermediate_size}


def padded(table: Tensor, rows: int) -> Tensor:
    """Return an embedding table or head, [V, D], with zero rows up to ``rows``."""
    missing = rows - table.shape[0]
    if missing <= 0:
        return table
    return torch.cat([table, table.new_zeros(missing, table.shape[1])])
