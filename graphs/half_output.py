"""Let a vision graph return float16 visual tokens, half of the bytes that are handed on."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from engines.errors import OptionError
from engines.staging import staged_file
from graphs.modules import MODULE_KEY, module_of

_FP16, _FP32 = ir.DataType.FLOAT16, ir.DataType.FLOAT


def write_half_output(file: Path, name: str) -> None:
    """Let a graph on the disk return an output in float16; its weights stay where they are.

    Args:
        file: a vision graph; it is replaced.
        name: of the output.

    Raises:
        OptionError: the graph has no such output in float32.
    """
    model = ir.load(file)
    halve_output(model, name)
    with staged_file(file) as staged:
        ir.save(model, staged)
        onnx.checker.check_model(str(staged), full_check=True)


def halve_output(model: ir.Model, name: str) -> None:
    """Return an output in float16 instead of float32, in place.

    A cast to float32 at the end, as a graph in float16 has one, goes away; others get one.

    Raises:
        OptionError: the graph has no such output in float32.
    """
    outputs = model.graph.outputs
    index = next((at for at, value in enumerate(outputs) if value.name == name), None)
    node = outputs[index].producer() if index is not None else None
    if index is None or node is None or outputs[index].dtype is not _FP32:
        raise OptionError(f"The graph has no output {name} in float32 that could be float16.")
    old = outputs[index]
    source = node.inputs[0]
    if node.op_type == "Cast" and source is not None and source.dtype is _FP16:
        outputs[index] = source
        if not old.uses():
            model.graph.remove(node, safe=True)
            old.name = None
        source.name = name
        return
    old.name = f"{node.name}:{old.index()}"
    cast = ir.node("Cast", [old], {"to": ir.AttrInt64("to", _FP16)}, name=f"{name}/to_float16")
    cast.metadata_props[MODULE_KEY] = module_of(node)
    new = cast.outputs[0]
    new.name, new.type, new.shape = name, ir.TensorType(_FP16), old.shape
    model.graph.append(cast)
    outputs[index] = new
