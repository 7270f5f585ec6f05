"""Check an ONNX graph for what TensorRT would refuse, before it reaches a robot.

Each refusal names the operator, the module it was traced from and what to change. TensorRT's own
parser decides in the end; this check knows its published rules and needs no TensorRT.

Sources: onnx-tensorrt's docs/operators.md at 10.1 and at 10.15 (operators, types, restrictions,
opsets), its Clip importer at 10.1 (integers, which the list leaves out), TensorRT's ONNX opset
guide for 11 (opset), and the rule of strongly typed networks that an operator's floating-point
inputs share one type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from engines.errors import EngineError, OptionError
from engines.manifest import TOKENS_AXIS
from engines.targets import Target
from graphs.modules import module_of

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_NUMBERS = _FLOATS | {ir.DataType.INT32, ir.DataType.INT64}
_ANY = _NUMBERS | {ir.DataType.BOOL}
_BOOL = frozenset({ir.DataType.BOOL})
_QUANTIZED = frozenset({ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN})

_TYPES: dict[str, frozenset[ir.DataType]] = {
    **dict.fromkeys(
        ("MatMul", "Gemm", "Conv", "LayerNormalization", "Softmax", "Sqrt", "Pow", "Exp"), _FLOATS
    ),
    **dict.fromkeys(("Floor", "Erf", "Sigmoid", "Tanh", "QuantizeLinear"), _FLOATS),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Max", "Min", "Clip"), _NUMBERS),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), _NUMBERS),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2"), _NUMBERS),
    **dict.fromkeys(("ArgMax", "TopK"), _NUMBERS),
    **dict.fromkeys(("Gather", "GatherElements", "Where", "Concat", "Slice", "Reshape"), _ANY),
    **dict.fromkeys(("Transpose", "Shape", "Expand", "Unsqueeze", "Squeeze", "Identity"), _ANY),
    **dict.fromkeys(("And", "Or", "Not"), _BOOL),
    "Constant": _ANY,
    "Cast": _ANY | {ir.DataType.UINT8},
    "DequantizeLinear": _QUANTIZED,
}
TENSORRT_OPS = frozenset(_TYPES)
"""Operators that TensorRT 10.3 to 11 parse, and the only ones a graph may be made of."""

OLDEST_TENSORRT = "10.3"
"""The oldest version Foveate builds for; what it takes, the later ones take too."""

_OPSETS: tuple[tuple[tuple[int, int], int], ...] = (((11, 0), 25), ((10, 15), 24), ((10, 0), 20))
"""From this TensorRT version on, its parser reads up to this opset."""

_ONE_TYPE = frozenset(
    {"MatMul", "Gemm", "Conv", "LayerNormalization", "Concat", "Where", "Clip", "Pow"}
    | {"Add", "Sub", "Mul", "Div", "Max", "Min"}
    | {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
)
_CONSTANT_INPUTS = {
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2"), (1,)),
    **dict.fromkeys(("Squeeze", "Unsqueeze", "TopK"), (1,)),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), (1, 2)),
}
_SHAPE_INPUTS = {"Reshape": (1,), "Expand": (1,), "Slice": (1, 2)}
_LARGEST_K = 3840
_LARGEST_RANK = 8
_INSTEAD = {
    "ScatterElements": "write it as a one-hot matrix times the values",
    "ScatterND": "write it as a one-hot matrix times the values",
    "NonZero": "how much it returns depends on the picture; use a mask and a fixed size",
    "Unique": "how much it returns depends on the picture; use a mask and a fixed size",
    "Attention": "parsers before 10.15 do not know it; write MatMul, Softmax, MatMul",
}


@dataclass(frozen=True)
class Refusal:
    """One thing that TensorRT would refuse.

    Attributes:
        node: name of the node, or of the graph's input.
        op: its operator.
        module: the module it was traced from.
        reason: what is wrong and what to do about it.
    """

    node: str
    op: str
    module: str
    reason: str

    def __str__(self) -> str:
        where = f" from {self.module}" if self.module else ""
        return f"{self.op} {self.node!r}{where}: {self.reason}"


def oldest_tensorrt(target: Target) -> str | None:
    """Return the oldest TensorRT that is to take a target's graphs; None where none is to.

    TensorRT takes from version to version more, so the oldest speaks for all.
    """
    if not target.needs_cuda:
        return None
    return (target.tensorrt_min if target.engine == "tensorrt" else None) or OLDEST_TENSORRT


def check_graph(file: Path, tensorrt: str) -> None:
    """Make sure that a TensorRT version will take a graph.

    Args:
        file: the graph.
        tensorrt: the version, such as ``"10.3"``.

    Raises:
        EngineError: it will not; the first refusal is given in full.
    """
    refusals = find_refusals(infer_types(ir.load(file)), tensorrt)
    if refusals:
        others = len(refusals) - 1
        more = f" {others} more such place{'s' if others > 1 else ''} follow." if others else ""
        raise EngineError(f"{file}: TensorRT {tensorrt} will refuse {refusals[0]}.{more}")


def infer_types(model: ir.Model) -> ir.Model:
    """Return the model with the types and shapes of its values, where they can be told."""
    return passes.ShapeInferencePass(check_type=False, strict_mode=False)(model).model


def find_refusals(model: ir.Model, tensorrt: str) -> list[Refusal]:
    """Return everything a TensorRT version would refuse, in the graph's order.

    Args:
        model: from `infer_types`.
        tensorrt: the version, such as ``"10.3"``; 10.0 is the oldest known.

    Raises:
        OptionError: the version is older, or not a version.
    """
    version = _parse_version(tensorrt)
    refusals = [*_check_opset(model, version), *_check_inputs(model)]
    for node in model.graph:
        refusals += [
            Refusal(node.name or "?", node.op_type, module_of(node), reason)
            for rule in _RULES
            for reason in rule(node, version)
        ]
    return refusals


def _parse_version(tensorrt: str) -> tuple[int, int]:
    parts = tensorrt.split(".")
    if len(parts) < 2 or not all(part.isdigit() for part in parts) or int(parts[0]) < 10:
        raise OptionError(f"TensorRT version {tensorrt!r}: expected 10.0 or later, such as 10.3.")
    return int(parts[0]), int(parts[1])


def _check_opset(model: ir.Model, version: tuple[int, int]) -> Iterator[Refusal]:
    largest = next(opset for since, opset in _OPSETS if version >= since)
    opset = model.opset_imports.get("", 0)
    if opset > largest:
        reason = f"its parser reads up to {largest}; export with opset {largest} or less"
        yield Refusal(str(opset), "opset", "", reason)


def _check_inputs(model: ir.Model) -> Iterator[Refusal]:
    for value in model.graph.inputs:
        dynamic = [
            axis
            for axis, size in enumerate(value.shape or ())
            if not isinstance(size, int) and size.value != TOKENS_AXIS
        ]
        if any(axis > 0 for axis in dynamic):
            reason = f"axes {dynamic} are dynamic and only the batch, axis 0, may be"
            yield Refusal(value.name or "?", "input", "", reason)


def _refuse_operator(node: ir.Node, version: tuple[int, int]) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"it is of the domain {node.domain!r}, which has no parser; export without fusions"
    elif node.op_type not in TENSORRT_OPS:
        instead = _INSTEAD.get(node.op_type, "express it with operators of TENSORRT_OPS")
        yield f"not an operator it takes; {instead}"


def _refuse_type(node: ir.Node, version: tuple[int, int]) -> Iterator[str]:
    allowed = _TYPES.get(node.op_type)
    if allowed is None:
        return
    read = _data_inputs(node)
    types = {value.dtype for value in read if value.dtype is not None}
    for value in read:
        if value.dtype is None:
            yield f"the type of what it reads, {value.name!r}, cannot be told"
    if wrong := sorted(kind.name for kind in types - allowed):
        names = ", ".join(sorted(kind.name for kind in allowed))
        yield f"it reads {', '.join(wrong)}, expected one of {names}"
    elif node.op_type in _ONE_TYPE and len(types) > 1:
        mixed = " and ".join(sorted(kind.name for kind in types))
        yield f"it mixes {mixed}, and a strongly typed network takes one type; put a Cast before it"
    if node.op_type == "Cast" and node.attributes["to"].as_int() not in _TYPES["Cast"]:
        yield f"it casts to {ir.DataType(node.attributes['to'].as_int()).name}"


def _refuse_shape(node: ir.Node, version: tuple[int, int]) -> Iterator[str]:
    for output in node.outputs:
        if output.shape is not None and len(output.shape) > _LARGEST_RANK:
            yield f"it makes a tensor of {len(output.shape)} axes, {_LARGEST_RANK} at most"
    for index in _SHAPE_INPUTS.get(node.op_type, ()):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and _depends_on_data(value):
            yield f"its shape {value.name!r} depends on data; make it a constant or use Shape"


def _refuse_variable(node: ir.Node, version: tuple[int, int]) -> Iterator[str]:
    indices = _CONSTANT_INPUTS.get(node.op_type, ())
    if node.op_type == "Slice" and version < (10, 15):
        indices = (3,)
    for index in indices:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and value.const_value is None:
            yield f"input {index}, {value.name!r}, must be a constant"


def _refuse_topk(node: ir.Node, version: tuple[int, int]) -> Iterator[str]:
    if node.op_type != "TopK":
        return
    k = node.inputs[1].const_value if node.inputs[1] is not None else None
    if k is not None and int(k.numpy().item()) > _LARGEST_K:
        yield f"K is {int(k.numpy().item())}, {_LARGEST_K} at most; reduce in two steps"
    if "sorted" in node.attributes and not node.attributes["sorted"].as_int():
        yield "sorted is 0, expected 1"


def _refuse_norm_outputs(node: ir.Node, version: tuple[int, int]) -> Iterator[str]:
    if node.op_type == "LayerNormalization" and any(out.uses() for out in node.outputs[1:]):
        yield "its mean and deviation are read, and only its first output can be used"


def _refuse_quantization(node: ir.Node, version: tuple[int, int]) -> Iterator[str]:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 2:
        return
    scale = node.inputs[1].const_value if node.inputs[1] is not None else None
    if scale is not None and not bool((scale.numpy() > 0).all()):
        yield "a scale is not above zero; calibrate again"
    zero_value = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_value is None:
        yield "it has no zero point, which means UINT8; quantize to INT8 or FLOAT8E4M3FN"
        return
    zero = zero_value.const_value
    if zero_value.dtype is not None and zero_value.dtype not in _QUANTIZED:
        yield f"it quantizes to {zero_value.dtype.name}, expected INT8 or FLOAT8E4M3FN"
    elif zero is not None and np.any(zero.numpy().astype(np.float32)):
        yield "its zero point is not 0; quantize symmetrically"


_RULES: tuple[Callable[[ir.Node, tuple[int, int]], Iterator[str]], ...] = (
    _refuse_operator,
    _refuse_type,
    _refuse_shape,
    _refuse_variable,
    _refuse_topk,
    _refuse_norm_outputs,
    _refuse_quantization,
)


def _data_inputs(node: ir.Node) -> list[ir.Value]:
    """Return the inputs that the operator computes with, indices and shapes left out."""
    inputs = list(node.inputs)
    if node.op_type == "Where":
        inputs = inputs[1:]
    elif node.op_type not in _ONE_TYPE:
        inputs = inputs[:1]
    return [value for value in inputs if value is not None]


def _depends_on_data(value: ir.Value) -> bool:
    """Return whether a value is computed from what is in a tensor, not from its shape alone."""
    waiting, seen = [value], set()
    while waiting:
        current = waiting.pop()
        if current in seen or current.is_initializer() or current.const_value is not None:
            continue
        seen.add(current)
        producer = current.producer()
        if producer is None:
            return True
        if producer.op_type not in ("Shape", "Constant"):
            waiting += [source for source in producer.inputs if source is not None]
    return False
