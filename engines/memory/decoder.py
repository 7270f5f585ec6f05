"""Count what a language model takes in this process: weights, KV cache, buffers.

The formulas are those of llama.cpp (llama-cpp-python 0.3.36) and of ONNX Runtime 1.31 on a CPU,
which `benchmarks.memory_told` compares with what the process really holds. Those for a GPU have not
been compared with one, and are marked as estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.llm_words import KvCache
from engines.manifest import DecoderShape
from engines.memory.context_length import round_up
from engines.memory.parts import MemoryPart, Place

BATCH_ROWS = 512
"""Positions that either backend computes at once, whatever the prompt's length."""

_Q4_K, _Q6_K, _Q8_0 = 4.5, 6.5625, 8.5
"""Bits of a weight in GGUF's block types, scales included."""
_GGUF_BITS = {"q8_0": _Q8_0, "f16": 16.0, "f32": 32.0}
_ONNX_BITS = {"fp32": 32.0, "int8": 8 + 32 / 32, "int4": 4 + 32 / 32}
"""In the file: INT8 and INT4 have one FP32 scale for 32 weights."""
_PACKED_OPENVINO = 2.0
"""What INT4 and INT8 weights take once OpenVINO has packed them, in sizes of the file; about."""
_PACKED_INT4 = 6 / 5
"""ONNX Runtime packs INT4 for the CPU with a second FP32 number for 32 weights, their sum."""
_CACHE_BYTES = {"f16": 2.0, "q8": _Q8_0 / 8}
WORDS = ("weights of the language model", "KV cache")


@dataclass(frozen=True)
class DecoderPlan:
    """How a decoder is going to be run.

    Attributes:
        backend: ``"ort"``, ``"openvino"`` or ``"llamacpp"``.
        precision: of its weights, in the backend's words.
        positions: what its KV cache holds.
        kv_cache: how llama.cpp keeps keys and values.
        on_gpu: whether a GPU computes it.
        file_bytes: size of its weights; None counts them from the shape.
    """

    backend: str
    precision: str
    positions: int
    kv_cache: KvCache = "f16"
    on_gpu: bool = False
    file_bytes: int | None = None


def decoder_parts(shape: DecoderShape, plan: DecoderPlan) -> list[MemoryPart]:
    """List what a decoder takes once its cache is full."""
    place: Place = "gpu" if plan.on_gpu else "host"
    weights = plan.file_bytes
    if weights is None:
        weights = int(weight_bits(shape, plan.backend, plan.precision) / 8)
    if plan.backend == "ort" and plan.precision == "int4" and not plan.on_gpu:
        weights = int(weights * _PACKED_INT4)
    if plan.backend == "openvino" and plan.precision != "fp32":
        weights = int(weights * _PACKED_OPENVINO)
    rows = 2 * plan.positions * shape.hidden_size * 4  # the prompt's rows, and a copy of them
    buffers = _llama_buffers(shape) if plan.backend == "llamacpp" else _ort_arena(shape, plan)
    return [
        MemoryPart(WORDS[0], weights, place),
        MemoryPart(f"{WORDS[1]}, {plan.positions} positions", kv_bytes(shape, plan), place),
        MemoryPart("compute buffers", buffers, place, "estimate" if plan.on_gpu else "counted"),
        MemoryPart("rows of the prompt", rows),
    ]


def kv_bytes(shape: DecoderShape, plan: DecoderPlan) -> int:
    """Return what the cache takes: all of it at once in llama.cpp, as it fills in ONNX Runtime."""
    numbers = 2 * shape.layers * shape.kv_heads * shape.head_size
    if plan.backend == "llamacpp":
        width = 4.0 if plan.precision == "f32" else _CACHE_BYTES[plan.kv_cache]
        return int(round_up(plan.positions) * numbers * width)
    return plan.positions * numbers * (2 if plan.on_gpu else 4)


def weight_bits(shape: DecoderShape, backend: str, precision: str) -> float:
    """Return the bits of all matrices but the embedding table, which stays on the disk."""
    d, m = shape.hidden_size, shape.intermediate
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    values, down, head = d * keys, m * d, d * shape.vocabulary
    rest = 2 * d * queries + d * keys + 2 * d * m
    layers = shape.layers
    if backend != "llamacpp":
        return (layers * (rest + values + down) + head) * _ONNX_BITS[precision]
    if precision != "q4_k_m":
        return (layers * (rest + values + down) + head) * _GGUF_BITS[precision]
    finer = sum(_has_finer_values(layer, layers) for layer in range(layers))
    return (
        layers * rest * _Q4_K
        + (values + down) * (finer * _Q6_K + (layers - finer) * _Q4_K)
        + head * _Q6_K
    )


def _has_finer_values(layer: int, layers: int) -> bool:
    """Tell which layers Q4_K_M gives Q6_K for values and the last MLP matrix (llama-quant.cpp)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _llama_buffers(shape: DecoderShape) -> int:
    """Return llama.cpp's compute buffer, reserved for logits of a whole batch."""
    widest = max(shape.vocabulary, 2 * shape.intermediate)
    return BATCH_ROWS * (widest + 2 * shape.hidden_size) * 4


def _ort_arena(shape: DecoderShape, plan: DecoderPlan) -> int:
    """Return ONNX Runtime's activations of a batch, attention over the whole cache among them."""
    rows = min(BATCH_ROWS, plan.positions)
    width = 2 if plan.on_gpu else 4
    scores = 0 if plan.on_gpu else shape.heads * rows * plan.positions
    return (scores + rows * (2 * shape.hidden_size + 3 * shape.intermediate)) * width
