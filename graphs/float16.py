"""Convert a float32 vision graph to float16, except for what selects tokens.

The tower and the projector compute in float16. The scores and the reducer stay in float32, because
rounding there would keep a different patch. Casts stand only at the border between the two, and the
graph's inputs and outputs keep their types. TensorRT from version 11 on takes precision from the
file alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from engines.errors import OptionError
from graphs.graph_file import ExportedGraph, write_graph
from graphs.modules import MODULE_KEY, is_inside, module_of

FP32_MODULES = ("reducer", "tower.scores")
"""Modules that choose tokens; they and what is inside them stay in float32."""

PRECISION_KEY = "foveate.precision"
"""Metadata of the model."""

_FP16, _FP32 = ir.DataType.FLOAT16, ir.DataType.FLOAT
_LARGEST = float(np.finfo(np.float16).max)


def write_fp16_graph(source: Path, file: Path) -> ExportedGraph:
    """Write a float32 graph as float16.

    Args:
        source: the float32 graph.
        file: where to write it.

    Raises:
        OptionError: the graph cannot be had in float16; see `convert_to_fp16`.
    """
    model = ir.load(source)
    convert_to_fp16(model)
    return write_graph(model, file, opset=model.opset_imports[""])


def convert_to_fp16(model: ir.Model, keep_fp32: Sequence[str] = FP32_MODULES) -> None:
    """Convert a float32 graph to float16, except the modules named, in place.

    LayerNormalization becomes float16 too, with its mean and variance computed in float32
    (`stash_type` 1 of the ONNX definition, which TensorRT's parser hands to its kernel), so that
    the square of a large activation does not overflow.

    Args:
        model: nodes carry the name of their module.
        keep_fp32: modules that stay as they are.

    Raises:
        OptionError: a weight is too large for float16, or the graph has Q/DQ below opset 19, the
            first that quantizes float16.
    """
    _refuse_early_quantization(model)
    converter = _Converter(model.graph)
    for node in list(model.graph):
        converter.retype(node, _FP32 if is_inside(module_of(node), keep_fp32) else _FP16)
    converter.restore_outputs()
    converter.rename_weights()
    model.metadata_props[PRECISION_KEY] = "fp16"


class _Converter:
    """Gives every node its type, and every value a copy for each type it is read in."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.twins: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def retype(self, node: ir.Node, wanted: ir.DataType) -> None:
        """Make a node read and write its floating-point values as `wanted`."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (_FP16, _FP32) and value.dtype is not wanted:
                node.replace_input_with(index, self._twin(value, wanted, node))
        if node.op_type == "Cast" and node.attributes["to"].as_int() in (_FP16, _FP32):
            node.attributes["to"] = ir.AttrInt64("to", wanted)
        if node.op_type == "LayerNormalization":
            node.attributes["stash_type"] = ir.AttrInt64("stash_type", _FP32)
        for output in node.outputs:
            if output.dtype in (_FP16, _FP32):
                output.dtype = wanted

    def restore_outputs(self) -> None:
        """Give the graph's outputs the type and the name they had."""
        for index, output in enumerate(self.graph.outputs):
            producer = output.producer()
            if output.dtype is not _FP16 or producer is None:
                continue
            name = output.name
            output.name = f"{producer.name}:{output.index()}"
            restored = self._twin(output, _FP32, None)
            restored.name = name
            self.graph.outputs[index] = restored

    def rename_weights(self) -> None:
        """Give a converted weight its own name back where nothing reads the original."""
        for (original, _), twin in self.twins.items():
            if original.is_initializer() and original.name and not original.uses():
                del self.graph.initializers[original.name]
                twin.name = original.name

    def _twin(self, value: ir.Value, wanted: ir.DataType, reader: ir.Node | None) -> ir.Value:
        key = (value, wanted)
        if key not in self.twins:
            weight = value.const_value if value.is_initializer() else None
            self.twins[key] = (
                self._cast(value, wanted, reader)
                if weight is None
                else self._convert(value, weight, wanted)
            )
        return self.twins[key]

    def _convert(self, value: ir.Value, weight: ir.TensorProtocol, wanted: ir.DataType) -> ir.Value:
        array = weight.numpy()
        largest = float(np.abs(array).max(initial=0.0))
        if not largest <= _LARGEST:
            raise OptionError(
                f"weight {value.name!r} reaches {largest:g}, and float16 ends at {_LARGEST:g}. "
                "Export this checkpoint with --precision fp32."
            )
        name = f"{value.name}.{wanted.name.lower()}"
        tensor = ir.tensor(array.astype(wanted.numpy()), name=name)
        twin = ir.Value(
            name=name, type=ir.TensorType(wanted), shape=value.shape, const_value=tensor
        )
        self.graph.register_initializer(twin)
        return twin

    def _cast(self, value: ir.Value, wanted: ir.DataType, reader: ir.Node | None) -> ir.Value:
        producer = value.producer()
        # The float16 side owns the border: whoever reads what is now float16, or made it.
        owner = reader if wanted is _FP16 or producer is None else producer
        cast = ir.node(
            "Cast",
            [value],
            {"to": ir.AttrInt64("to", wanted)},
            name=f"{value.name}/to_{wanted.name.lower()}",
        )
        cast.metadata_props[MODULE_KEY] = module_of(owner) if owner is not None else ""
        twin = cast.outputs[0]
        twin.name, twin.type, twin.shape = f"{cast.name}:0", ir.TensorType(wanted), value.shape
        if reader is not None:
            self.graph.insert_before(reader, cast)
        else:
            self.graph.append(cast)
        return twin


def _refuse_early_quantization(model: ir.Model) -> None:
    opset = model.opset_imports[""]
    if opset >= 19:
        return
    quantized = [node.name for node in model.graph if node.op_type == "QuantizeLinear"]
    if quantized:
        raise OptionError(
            f"the graph is quantized ({len(quantized)} QuantizeLinear, the first is "
            f"{quantized[0]!r}) and of opset {opset}, which quantizes float32 only. Export it with "
            "opset 19 to have the rest in float16."
        )
