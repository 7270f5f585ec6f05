"""Export the language model (Llama, Qwen2, Qwen2.5 or Qwen3) to a GGUF file for llama.cpp.

The file is float16 or float32; `gguf_quantize` makes it smaller. It has no tokenizer: its
vocabulary is "none" with a number of ids, because the bundle's tokenizer.json makes the ids and
the bundle's embedding table makes the rows for every backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engines.errors import CheckpointError
from export.checkpoint.llava import Checkpoint
from export.checkpoint.weights import Part
from export.language.causal_lm import head_size

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_LLAMA_ROTARY_KINDS = ("default", "linear", "llama3")
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_ROTARY_FACTORS = "rope_freqs.weight"
_NO_TOKENIZER = "none"


@dataclass(frozen=True)
class _Layout:
    """How the tensors of one checkpoint are named and arranged in its GGUF.

    Attributes:
        config: of the language model.
        names: from transformers' tensor names to GGUF's.
        dtype: of the matrices; vectors are always float32.
        interleaved: llama.cpp rotates neighbouring pairs in this family, transformers halves.
    """

    config: Any
    names: gguf.TensorNameMap
    dtype: np.dtype[Any]
    interleaved: bool

    def name_of(self, plain: str) -> str:
        stem, suffix = plain.rsplit(".", 1)
        found = self.names.get_name(stem)
        if found is None:
            raise CheckpointError(
                f"The language model has a tensor {plain!r}, which llama.cpp's "
                f"{self.config.model_type} does not know. Merge adapters into the model first, or "
                "build with --llm-backend ort."
            )
        return f"{found}.{suffix}"

    def dtype_of(self, shape: tuple[int, ...]) -> np.dtype[Any]:
        return self.dtype if len(shape) > 1 else np.dtype(np.float32)

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.dtype_of(shape).itemsize

    def array(self, plain: str, tensor: Tensor) -> NDArray[Any]:
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }
        count = heads.get(plain.split(".")[-2])
        if self.interleaved and count is not None:
            tensor = _interleave_halves(tensor, count)
        with np.errstate(over="ignore"):
            values: NDArray[Any] = tensor.float().numpy().astype(self.dtype_of(tuple(tensor.shape)))
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"The language model's {plain} holds numbers up to "
                f"{tensor.abs().max().item():g}: NaN, or too large for float16, which ends at "
                "65504. The weights are damaged, or this model needs --llm-backend ort."
            )
        return values


def write_gguf(
    checkpoint: Checkpoint,
    file: Path,
    precision: Literal["f16", "f32"] = "f16",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the language model of a checkpoint as a GGUF file.

    Tensor by tensor, so memory holds one of them at a time.

    Args:
        checkpoint: an opened LLaVA checkpoint.
        file: where to write.
        precision: of the matrices; ``"f32"`` is exact, to compare with.
        progress: called with the bytes written and the bytes there are.

    Raises:
        CheckpointError: llama.cpp would not compute what this model computes, or a weight does
            not fit float16.
    """
    config: Any = checkpoint.text_config
    problems = read_gguf_limits(config)
    if problems:
        raise CheckpointError(
            f"{checkpoint.root / 'config.json'}: the language model cannot become a GGUF file: "
            f"{'; '.join(problems)}. Build with --llm-backend ort."
        )
    checkpoint.check(Part.LANGUAGE_MODEL)
    architecture = _ARCHITECTURES[config.model_type]
    layout = _Layout(
        config,
        gguf.get_tensor_name_map(architecture, config.num_hidden_layers),
        np.dtype(np.float16 if precision == "f16" else np.float32),
        interleaved=config.model_type == "llama",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.part")
    writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        _describe(writer, checkpoint)
        kinds = gguf.LlamaFileType
        writer.add_file_type(kinds.MOSTLY_F16 if precision == "f16" else kinds.ALL_F32)
        _write_tensors(writer, checkpoint, layout, progress)
        writer.close()
        unfinished.replace(file)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)


def _write_tensors(
    writer: gguf.GGUFWriter,
    checkpoint: Checkpoint,
    layout: _Layout,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the head of the file, with every tensor's shape, and then the tensors one by one."""
    factors = _rotary_factors(checkpoint.text_config)
    if factors is not None:
        writer.add_tensor_info(_ROTARY_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    shapes = _shapes(checkpoint)
    for plain, shape in shapes.items():
        dtype, nbytes = layout.dtype_of(shape), layout.bytes_of(shape)
        writer.add_tensor_info(layout.name_of(plain), shape, dtype, nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    written, total = 0, sum(map(layout.bytes_of, shapes.values()))
    for plain, tensor in checkpoint.weights.read_one_by_one(Part.LANGUAGE_MODEL):
        if plain in shapes:
            writer.write_tensor_data(layout.array(plain, tensor))
            written += layout.bytes_of(shapes[plain])
            if progress is not None:
                progress(written, total)


def read_gguf_limits(config: Any) -> list[str]:
    """Return why a language model cannot become a GGUF file; nothing when it can."""
    kind = config.model_type
    problems = []
    if kind not in _ARCHITECTURES:
        problems.append(f"model_type is {kind!r}, not one of {', '.join(_ARCHITECTURES)}")
    rotary = _rotary(config).get("rope_type", "default")
    known = _LLAMA_ROTARY_KINDS if kind == "llama" else ("default",)
    if rotary not in known:
        problems.append(f"rope_type is {rotary!r}, for {kind} not one of {', '.join(known)}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        problems.append("some layers attend to a sliding window, which rewinding would break")
    if config.hidden_act != "silu":
        problems.append(f"hidden_act is {config.hidden_act!r}, and llama.cpp computes 'silu'")
    return problems


def _describe(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    config: Any = checkpoint.text_config
    rotary = _rotary(config)
    width = head_size(config)
    writer.add_name(checkpoint.name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rotary.get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(width)
    writer.add_tokenizer_model(_NO_TOKENIZER)
    writer.add_vocab_size(checkpoint.embedding_table().shape[0])


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors to write, in order; the head only if it is its own."""
    tied = bool(checkpoint.config.tie_word_embeddings)
    shapes = checkpoint.weights.shapes(Part.LANGUAGE_MODEL)
    if not tied and _HEAD not in shapes:
        raise CheckpointError(
            f"{checkpoint.root}: no {_HEAD}, although tie_word_embeddings is false. The download "
            "is incomplete, or config.json is of another model: download the checkpoint again."
        )
    return {
        plain: shape
        for plain, shape in shapes.items()
        if not (tied and plain == _HEAD) and not plain.endswith("rotary_emb.inv_freq")
    }


def _interleave_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection from halves to neighbouring pairs.

    transformers rotates row i with row i + d/2 of a head, llama.cpp's llama row 2i with 2i + 1.
    """
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])  # [H, 2, d/2, ...]
    return halves.transpose(1, 2).reshape(weight.shape)


def _rotary_factors(config: Any) -> NDArray[np.float32] | None:
    """Return what divides each rotary frequency, float32[d/2], or None where nothing does."""
    rotary = _rotary(config)
    kind = rotary.get("rope_type", "default")
    if kind == "default":
        return None
    width = head_size(config)
    theta = float(rotary.get("rope_theta", 10000.0))
    plain = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    factors: NDArray[np.float32] = (plain / scaled).numpy()
    return factors


def _rotary(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}
