"""Write a vision graph to disk: its operator set, its weights, and ONNX's own check.

The result is one `.onnx` file, or nothing. Weights lie beside it when they are too large for one
file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from engines.errors import OptionError
from engines.manifest import TensorSpec
from engines.staging import staged_file

OPSETS = (17, 18, 19)
"""What TensorRT 10.3 to 11 all read."""

HALF_OPSET = 19
"""The first operator set that quantizes float16, and to float8."""

DIGEST_KEY = "foveate.weights_sha256"
"""Metadata of a graph whose weights lie beside it: their digest. Who sees only the graph (the
sidecar of a TensorRT plan) still notices other weights."""

_PROTOBUF_LIMIT_BYTES = 2**31 - 2**20
_LEAST_BYTES = 4096
"""Smaller tensors stay in the graph; TensorRT and ONNX Runtime read shapes and axes from there."""
_PAGE_BYTES = 4096
"""Every tensor begins on a page, so that ONNX Runtime can map the file instead of reading it."""


@dataclass(frozen=True)
class ExportedGraph:
    """What was written.

    Attributes:
        file: the `.onnx` file.
        weights_file: where its weights lie, if not in it.
        inputs: what it takes.
        outputs: what it returns.
        opset: its ONNX operator set.
    """

    file: Path
    weights_file: Path | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int


def write_graph(
    model: ir.Model,
    file: Path,
    *,
    opset: int = 18,
    external_weights: bool | None = None,
) -> ExportedGraph:
    """Write a traced graph; nothing appears at `file` unless ONNX's own checker accepts it.

    Args:
        model: from `trace_graph`; left at `opset`, its weights where they were written.
        file: where to write; external weights go to ``<file>.data``.
        opset: one of `OPSETS`.
        external_weights: keep the weights in a file of their own; None: only beyond 2 GB.

    Raises:
        OptionError: the opset is not one of `OPSETS`.
    """
    check_opset(opset)
    set_opset(model, opset)
    size = sum(w.const_value.nbytes for w in model.graph.initializers.values() if w.const_value)
    external = size > _PROTOBUF_LIMIT_BYTES if external_weights is None else external_weights
    weights_file = file.with_name(f"{file.name}.data") if external else None
    try:
        if weights_file is None:
            ir.external_data.load_to_model(model)  # what was read from elsewhere comes along
        else:
            _place_weights(model, weights_file)
        with staged_file(file) as staged:
            ir.save(model, staged)
            onnx.checker.check_model(str(staged), full_check=True)
    except BaseException:
        if weights_file is not None:
            weights_file.unlink(missing_ok=True)
        raise
    return ExportedGraph(
        file=file,
        weights_file=weights_file,
        inputs=tuple(_spec(value) for value in model.graph.inputs),
        outputs=tuple(_spec(value) for value in model.graph.outputs),
        opset=opset,
    )


def _place_weights(model: ir.Model, file: Path) -> None:
    """Move the large weights of a graph into a file, and note their digest."""
    whole = hashlib.sha256()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        for name, value in sorted(model.graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _LEAST_BYTES:
                continue
            data = tensor.tobytes()
            whole.update(name.encode() + hashlib.sha256(data).digest())
            stream.write(bytes(-stream.tell() % _PAGE_BYTES))
            value.const_value = ir.ExternalTensor(
                file.name,
                stream.tell(),
                len(data),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
                base_dir=file.parent,
            )
            stream.write(data)
    model.metadata_props[DIGEST_KEY] = whole.hexdigest()


def check_opset(opset: int) -> None:
    """Make sure that a graph can be written in an opset.

    Raises:
        OptionError: it cannot.
    """
    if opset not in OPSETS:
        raise OptionError(
            f"opset {opset} is not one of {', '.join(map(str, OPSETS))}, which TensorRT 10.3 to 11 "
            "all read. Leave it out to get 18."
        )


def set_opset(model: ir.Model, opset: int) -> None:
    """Move a graph of opset 18 to 17 or 19.

    Of the operators used here only the reductions differ: their axes were an attribute until 17.
    ONNX's own converter knows that too, but forgets what a node's module was and stops at 2 GB.
    Should an operator ever need more than this, the checker refuses the file.
    """
    if model.opset_imports[""] == opset:
        return
    for node in model.graph:
        if opset == 17 and node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            given = node.inputs[1] if len(node.inputs) == 2 else None
            axes = given.const_value if given is not None else None
            if axes is None:
                raise RuntimeError(f"{node.name}: the axes of {node.op_type} are not constant")
            node.attributes.pop("noop_with_empty_axes", None)
            node.attributes.add(ir.AttrInt64s("axes", axes.numpy().tolist()))
            node.resize_inputs(1)
    passes.RemoveUnusedNodesPass()(model)
    model.opset_imports[""] = opset


def _spec(value: ir.Value) -> TensorSpec:
    if value.name is None or value.dtype is None or value.shape is None:
        raise RuntimeError(f"graph input or output {value!r} has no name, type or shape")
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec.model_validate(
        {"name": value.name, "dtype": str(value.dtype.numpy()), "shape": shape}
    )
