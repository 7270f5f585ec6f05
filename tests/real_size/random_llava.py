"""Write a LLaVA-1.5 of random weights in its real size, tensor by tensor.

It has the shapes and the dtype (float16) of llava-hf/llava-1.5-7b-hf, in shards. Its answers mean
nothing; memory, disk and time are those of the real one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from engines import cli
from engines.option_groups import one_of
from export.checkpoint.weights import INDEX_FILE
from tests.tiny_language import SPECIAL, write_checkpoint_words

Size = Literal["tinyllama", "7b", "13b"]

SHARD_BYTES = 5_000_000_000
_DEVIATION = 0.02
_SIZES: dict[Size, dict[str, int]] = {
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {},
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}

Shapes = dict[str, tuple[int, ...]]


def write_random_llava(root: Path, size: Size = "7b", layers: int | None = None) -> Path:
    """Write the checkpoint, unless it is there already.

    Args:
        root: its directory.
        size: which model.
        layers: of the language model; left out, all of them.
    """
    if (root / INDEX_FILE).is_file():
        return root
    config = _config(size, layers)
    root.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(root)
    write_checkpoint_words(root, config)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    shards = list(_shards(shapes))
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(root / name, shard, generator)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (root / INDEX_FILE).write_text(json.dumps(index, indent=1), "utf-8")
    return root


def _config(size: Size, layers: int | None) -> LlavaConfig:
    fields: dict[str, int] = _SIZES[size] | (
        {} if layers is None else {"num_hidden_layers": layers}
    )
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5, **fields)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=576,
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
        dtype="float16",
    )


def _shards(shapes: Shapes) -> Iterator[Shapes]:
    shard: Shapes = {}
    for name, shape in shapes.items():
        if shard and sum(map(_nbytes, [*shard.values(), shape])) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def _write_shard(file: Path, shard: Shapes, generator: torch.Generator) -> None:
    """Write the safetensors format by hand, because its library wants a whole shard in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.items():
        end = offset + _nbytes(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name, shape in shard.items():
            stream.write(_values(name, shape, generator).numpy().data)


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=torch.float16)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.float16)
    values = torch.empty(shape).normal_(std=_DEVIATION, generator=generator)
    return values.half()


def main(
    directory: Path,
    size: Annotated[str, typer.Option(help="tinyllama, 7b or 13b.")] = "7b",
    layers: Annotated[int | None, typer.Option(help="Of the language model; all.")] = None,
) -> None:
    """Write a LLaVA-1.5 of random weights, in its real size."""
    print(write_random_llava(directory, one_of("--size", size, Size), layers))


if __name__ == "__main__":
    cli.run(main, ["python -m tests.real_size.random_llava build/llava-7b"])
