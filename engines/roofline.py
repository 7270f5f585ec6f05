"""A roofline estimate of what a language model costs on a device, with few or many visual tokens.

The time is a lower bound that no implementation can beat: for each operator the larger of
operations / peak and bytes / bandwidth, summed. A real engine is slower.

The operator list follows LLM-Viewer (arXiv 2402.16363), the tool that the PruMerge and M3 papers
computed their efficiency tables with; `tests/engines/test_roofline.py` reproduces both tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError, OptionError
from engines.targets import Target


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of a transformer: a decoder, or a vision tower where `vocabulary` is 0."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    gated_mlp: bool = True
    """Three MLP matrices (LLaMA) rather than two (CLIP)."""

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        """Columns of the key projection."""
        return self.head_size * self.kv_heads

    @property
    def layer_matrices(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of every matrix of one layer."""
        d, m, kv = self.hidden, self.intermediate, self.kv_width
        mlp = ((d, m), (d, m), (m, d)) if self.gated_mlp else ((d, m), (m, d))
        return ((d, d), (d, kv), (d, kv), (d, d), *mlp)

    @property
    def parameters(self) -> int:
        """Weights that are multiplied with: every layer and the output head."""
        in_layers = self.layers * sum(rows * columns for rows, columns in self.layer_matrices)
        return in_layers + self.hidden * self.vocabulary


MODELS = {
    "llava-1.5-7b": TransformerShape(32, 4096, 11008, 32, 32, 32000),
    "llava-1.5-13b": TransformerShape(40, 5120, 13824, 40, 40, 32000),
    "tinyllama-1.1b": TransformerShape(22, 2048, 5632, 32, 4, 32000),
}
FAMILIES = {
    "llama": TransformerShape(32, 4096, 11008, 32, 32, 32000),
    "mistral": TransformerShape(32, 4096, 14336, 32, 8, 32000),
    "qwen2": TransformerShape(32, 4096, 22016, 32, 32, 151936),
    "qwen3": TransformerShape(32, 4096, 22016, 32, 32, 151936),
}
"""What transformers takes for sizes that a config.json leaves out, as llava-hf's own do."""
CLIP_L_336 = TransformerShape(23, 1024, 4096, 16, 16, 0, gated_mlp=False)
CLIP_L_336_POSITIONS = 577

_SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_attention_heads": "heads",
    "vocab_size": "vocabulary",
}
"""Names of a config.json -> fields of `TransformerShape`."""


@dataclass(frozen=True)
class Bits:
    """Bits per number. `overhead` is what scales add to quantized weights."""

    weights: int
    activations: int
    kv: int
    overhead: float = 1.0

    @property
    def weight_bytes(self) -> float:
        """Bytes per weight, scales included."""
        return self.weights / 8 * self.overhead


LLM_PRECISIONS = {
    "fp16": Bits(16, 16, 16),
    "int8": Bits(8, 16, 16, overhead=1 + 16 / (8 * 128)),
    "int4": Bits(4, 16, 16, overhead=1 + 16 / (4 * 32)),
}
"""Weight-only quantization with one FP16 scale for 128 (INT8) or 32 (INT4) weights."""


@dataclass(frozen=True)
class Roof:
    """The peaks of a device."""

    bandwidth_bytes_s: float
    fp16_ops_s: float
    int8_ops_s: float

    def peak_ops_s(self, bits: Bits) -> float:
        """Return the peak of the narrowest multiplier that takes the wider operand."""
        return self.int8_ops_s if max(bits.weights, bits.activations) <= 8 else self.fp16_ops_s


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of one operator, or of a sum of them."""

    operations: float
    weight_bytes: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0

    @property
    def moved_bytes(self) -> float:
        """All bytes that cross the memory bus."""
        return self.weight_bytes + self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class Estimate:
    """One prompt and its answer on one device; times are lower bounds."""

    prompt_tokens: int
    prefill_operations: float
    prefill_ms: float
    decode_tokens_s: float
    weight_bytes: float
    kv_bytes: float
    activation_bytes: float

    @property
    def memory_bytes(self) -> float:
        """Weights, KV cache and the largest activation, without what a framework adds."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


def shape_from_config(path: Path) -> TransformerShape:
    """Read the decoder's shape from a checkpoint directory or its `config.json`.

    Raises:
        CheckpointError: no such file, not JSON, or a size is missing.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as a checkpoint's config.json ({error}). Give a checkpoint "
            f"directory or one of {', '.join(MODELS)}."
        ) from error
    text = config.get("text_config") or config
    usual = FAMILIES.get(text.get("model_type", ""))
    sizes: dict[str, Any] = {}
    for key, field in _SIZES.items():
        given = text.get(key, None if usual is None else getattr(usual, field))
        if isinstance(given, int):
            sizes[field] = given
    missing = [key for key, field in _SIZES.items() if field not in sizes]
    if missing:
        raise CheckpointError(
            f"{file}: {', '.join(missing)} missing from the text model's configuration."
        )
    own_heads = "num_attention_heads" in text
    default = usual.kv_heads if usual is not None and not own_heads else sizes["heads"]
    kv_heads = int(text.get("num_key_value_heads") or default)
    return TransformerShape(**sizes, kv_heads=kv_heads)


def roof_of(target: Target) -> Roof:
    """Return a target's peaks.

    Raises:
        OptionError: the target has none, because they depend on the machine.
    """
    if not (target.bandwidth_gb_s and target.fp16_tflops and target.int8_tops):
        raise OptionError(
            f"--target {target.name}: its peaks depend on the machine, so there is nothing to "
            f"estimate from. Give bandwidth_gb_s, fp16_tflops and int8_tops for [{target.name}] "
            f"in a TOML file and pass --targets FILE."
        )
    return Roof(target.bandwidth_gb_s * 1e9, target.fp16_tflops * 1e12, target.int8_tops * 1e12)


def list_costs(
    shape: TransformerShape, tokens: int, bits: Bits, *, past: int = 0, fused: bool = True
) -> list[Cost]:
    """List the operators of one pass over ``tokens`` new tokens.

    Args:
        shape: the transformer.
        tokens: new positions, 1 for a decoding step.
        bits: widths of weights, activations and KV cache.
        past: positions already in the KV cache.
        fused: attention that never writes its matrix (FlashAttention); False is what the papers'
            tables assume.
    """
    context = past + tokens
    act, d, n = bits.activations / 8, shape.hidden, tokens
    layer = [
        Cost(2 * n * rows * cols, rows * cols * bits.weight_bytes, n * rows * act, n * cols * act)
        for rows, cols in shape.layer_matrices
    ]
    scores = n * context * shape.heads
    kv_read = context * shape.kv_width * bits.kv / 8
    if fused:
        operations = 4 * n * context * d + 5 * scores
        layer.append(Cost(operations, 0, n * d * act + 2 * kv_read, n * d * act))
    else:
        layer += [
            Cost(2 * n * context * d, 0, n * d * act + kv_read, scores * act),
            Cost(5 * scores, 0, scores * act, scores * act),
            Cost(2 * n * context * d, 0, scores * act + kv_read, n * d * act),
        ]
    norm, add = (Cost(each * n * d, 0, n * d * act, n * d * act) for each in (7, 1))
    activation = Cost(2 * n * d, 0, 2 * n * d * act, n * d * act)
    layer += [norm, norm, add, add, activation]
    head = Cost(2 * d * shape.vocabulary, d * shape.vocabulary * bits.weight_bytes, d * act)
    return layer * shape.layers + ([head] if shape.vocabulary else [])


def total_cost(costs: Iterable[Cost]) -> Cost:
    """Add operators up."""
    items = list(costs)
    return Cost(
        sum(item.operations for item in items),
        sum(item.weight_bytes for item in items),
        sum(item.read_bytes for item in items),
        sum(item.written_bytes for item in items),
    )


def least_seconds(costs: Iterable[Cost], roof: Roof, bits: Bits) -> float:
    """Return the time no implementation of these operators, one after another, can beat."""
    peak = roof.peak_ops_s(bits)
    return sum(
        max(item.operations / peak, item.moved_bytes / roof.bandwidth_bytes_s) for item in costs
    )


def estimate_answer(
    shape: TransformerShape, roof: Roof, bits: Bits, *, prompt_tokens: int, new_tokens: int
) -> Estimate:
    """Estimate reading a prompt and writing an answer, batch 1, fused attention."""
    prefill = list_costs(shape, prompt_tokens, bits)
    longest = prompt_tokens + new_tokens
    step = list_costs(shape, 1, bits, past=longest - 1)
    act = bits.activations / 8
    return Estimate(
        prompt_tokens=prompt_tokens,
        prefill_operations=total_cost(prefill).operations,
        prefill_ms=least_seconds(prefill, roof, bits) * 1e3,
        decode_tokens_s=1 / least_seconds(step, roof, bits),
        weight_bytes=shape.parameters * bits.weight_bytes + shape.vocabulary * shape.hidden * 2,
        kv_bytes=2 * shape.layers * longest * shape.kv_width * bits.kv / 8,
        activation_bytes=prompt_tokens * (2 * shape.intermediate + 2 * shape.hidden) * act,
    )


def visionzip_operations(shape: TransformerShape, tokens: int) -> int:
    """Return T(4nd^2 + 2n^2d + 2ndm), the count VisionZip reports (arXiv 2412.04467).

    It counts a multiply-add as one and the MLP as two matrices, so it is lower than what
    `list_costs` counts (two operations each, three matrices).
    """
    n, d, m = tokens, shape.hidden, shape.intermediate
    return shape.layers * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
