"""Quantize the matrices of an ONNX decoder one by one, each when it is written.

`MatMulNBits` takes the place of `MatMul` in the graph at once; the weights are computed later, by
ONNX Runtime's own block quantizer. The numbers are those of quantizing the graph whole, but the
whole is never in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.tensor_adapters import TorchTensor
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)
from torch import Tensor

from export.language.deferred_weights import DeferredTensor

Array = NDArray[Any]

_DOMAIN = "com.microsoft"
_OPSET, _IR_VERSION = 21, 10
"""What ONNX Runtime's quantizer raises a graph to."""


@dataclass(frozen=True)
class Blocks:
    """How weights are quantized: the fields of a `MatMulNBits` node.

    Attributes:
        bits: of a weight.
        size: how many weights share a scale.
        symmetric: no zero points.
        accuracy_level: 4 lets the kernel compute in INT8; 0 leaves the attribute out.
    """

    bits: int
    size: int
    symmetric: bool
    accuracy_level: int


@dataclass(frozen=True)
class Piece:
    """Tensors that are computed together, in the order of the file.

    Attributes:
        values: of the graph.
        compute: returns their arrays.
    """

    values: tuple[ir.Value, ...]
    compute: Callable[[], Sequence[Array]]

    @property
    def nbytes(self) -> int:
        """What they take in the file."""
        return sum(bytes_of(value) for value in self.values)


def bytes_of(value: ir.Value) -> int:
    """Return the bytes of an initializer, from its shape and dtype."""
    shape, dtype = _described(value)
    return math.prod(shape) * dtype.bitwidth // 8


def quantize_matrices(model: ir.Model, blocks: Blocks, excluded: Sequence[str] = ()) -> list[Piece]:
    """Put `MatMulNBits` in place of every `MatMul` with a constant matrix.

    Args:
        model: the graph; it is changed.
        blocks: how to quantize.
        excluded: names of nodes that stay as they are.

    Returns:
        All initializers of the graph, in the order in which to write them.
    """
    pieces = {}
    for node in list(model.graph):
        matrix = node.inputs[1] if node.op_type == "MatMul" else None
        if matrix is None or matrix.const_value is None or node.name in excluded:
            continue
        piece = _quantized(matrix, blocks)
        pieces[piece.values[0].name] = piece
        _replace_node(model.graph, node, matrix, piece.values, blocks)
        if not matrix.uses():
            del model.graph.initializers[str(matrix.name)]
    model.opset_imports.setdefault(_DOMAIN, 1)
    model.opset_imports[""] = max(model.opset_imports[""], _OPSET)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    return list(_in_order(model.graph, pieces))


def plain_pieces(graph: ir.Graph) -> list[Piece]:
    """Return the initializers of a graph that stays in floating point."""
    return list(_in_order(graph, {}))


def _in_order(graph: ir.Graph, quantized: dict[str | None, Piece]) -> Iterator[Piece]:
    made = {value.name for piece in quantized.values() for value in piece.values}
    for name, value in graph.initializers.items():
        if name in quantized:
            yield quantized[name]
        elif name not in made:
            yield Piece((value,), _plain(value))


def _plain(value: ir.Value) -> Callable[[], list[Array]]:
    return lambda: [array_of(value)]


def array_of(value: ir.Value) -> Array:
    """Return the values of an initializer, contiguous; deferred ones are computed."""
    tensor: Any = value.const_value
    if isinstance(tensor, ir.LazyTensor):
        tensor = tensor.raw()
    raw = tensor.raw if isinstance(tensor, TorchTensor) else None
    if isinstance(raw, DeferredTensor):
        raw = raw.compute()
    if isinstance(raw, Tensor):
        with torch.no_grad():
            return np.ascontiguousarray(raw.contiguous().numpy())
    return np.ascontiguousarray(tensor.numpy())


def _quantized(matrix: ir.Value, blocks: Blocks) -> Piece:
    (rows, columns), dtype = _described(matrix)
    count = -(-rows // blocks.size)
    per_byte = 8 // blocks.bits
    name = matrix.name
    packed = (columns, count, blocks.size // per_byte)
    values = [
        _promised(f"{name}_Q{blocks.bits}", ir.DataType.UINT8, packed),
        _promised(f"{name}_scales", dtype, (columns, count)),
    ]
    if not blocks.symmetric:
        zero_points = (columns, -(-count // per_byte))
        values.append(_promised(f"{name}_zero_points", ir.DataType.UINT8, zero_points))
    quantizer: Any = DefaultWeightOnlyQuantizer(
        DefaultWeightOnlyQuantConfig(
            block_size=blocks.size,
            is_symmetric=blocks.symmetric,
            accuracy_level=blocks.accuracy_level,
            bits=blocks.bits,
        )
    )
    return Piece(
        tuple(values), lambda: quantizer.qbits_block_quant(array_of(matrix))[: len(values)]
    )


def _described(value: ir.Value) -> tuple[tuple[int, ...], ir.DataType]:
    """Return an initializer's shape and dtype."""
    tensor = value.const_value
    if tensor is None:
        raise TypeError(f"{value.name} is not an initializer")
    return tuple(int(str(size)) for size in tensor.shape), tensor.dtype


def _promised(name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """Return an initializer whose array only its `Piece` computes."""

    def refuse() -> ir.TensorProtocol:
        raise RuntimeError(f"{name} is computed when the file is written, not before")

    tensor = ir.LazyTensor(refuse, dtype=dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)


def _replace_node(
    graph: ir.Graph, node: ir.Node, matrix: ir.Value, values: Sequence[ir.Value], blocks: Blocks
) -> None:
    (rows, columns), _ = _described(matrix)
    for value in values:
        graph.register_initializer(value)
    attributes = {"K": rows, "N": columns, "bits": blocks.bits, "block_size": blocks.size}
    if blocks.accuracy_level:
        attributes["accuracy_level"] = blocks.accuracy_level
    old = node.outputs[0]
    new = ir.node(
        "MatMulNBits",
        [node.inputs[0], *values],
        attributes,
        domain=_DOMAIN,
        name=f"{node.name}_Q{blocks.bits}",
    )
    made = new.outputs[0]
    made.name, made.type, made.shape = old.name, old.type, old.shape
    graph.insert_before(node, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = made
    old.replace_all_uses_with(made)
    graph.remove(node, safe=True)
