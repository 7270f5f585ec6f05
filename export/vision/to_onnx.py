"""Export a float32 `VisionModule` to an ONNX file that ONNX Runtime and TensorRT take.

Its nodes are named after the modules they come from, because the quantizer, the FP16 converter and
the graph check must tell the reducer's nodes from the tower's.
"""

from __future__ import annotations

import ast
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import opset18 as op
from torch import nn

from engines import __version__
from export.reducers import Reducer
from export.vision.vision_module import INPUT, VisionModule
from graphs.graph_file import ExportedGraph, check_opset, write_graph
from graphs.modules import MODULE_KEY

_MAX_BATCH = 1024
_EXAMPLE_SIZE, _MOST_TOKENS = 5, 2**16
"""Of an axis of any size: in the example, and at most."""


def export_onnx(
    graph: VisionModule,
    file: Path,
    *,
    opset: int = 18,
    metadata: Mapping[str, str] | None = None,
    external_weights: bool | None = None,
) -> ExportedGraph:
    """Write a visual graph to `file`.

    Args:
        graph: in float32.
        file: where to write; external weights go to ``<file>.data``.
        opset: one of `OPSETS`.
        metadata: what to write into the model beside what it says of its reducer.
        external_weights: keep the weights in a file of their own; None: only beyond 2 GB.

    Raises:
        OptionError: the opset is not one of `OPSETS`.
    """
    check_opset(opset)
    model = trace_graph(graph)
    model.metadata_props.update(metadata or {})
    return write_graph(model, file, opset=opset, external_weights=external_weights)


def trace_graph(graph: VisionModule) -> ir.Model:
    """Return a visual graph as an ONNX model of opset 18, nodes named after their modules."""
    side = graph.image_size
    model = trace_module(graph, {INPUT: (3, side, side)}, graph.outputs)
    note_reducer(model, graph.reducer.reduce, graph.token_count)
    return model


def trace_module(
    module: nn.Module,
    inputs: Mapping[str, tuple[int | str, ...]],
    outputs: Sequence[str],
) -> ir.Model:
    """Return a module as an ONNX model of opset 18, nodes named after the modules in it.

    Args:
        module: takes and returns float32 tensors.
        inputs: their names and their shapes behind the batch; a name is an axis of any size.
        outputs: their names.
    """
    # A batch of two, because torch.export takes a dimension of one for a constant.
    examples = tuple(
        torch.zeros(2, *(_EXAMPLE_SIZE if isinstance(axis, str) else axis for axis in shape))
        for shape in inputs.values()
    )
    names = {axis for shape in inputs.values() for axis in shape if isinstance(axis, str)}
    axes = {name: torch.export.Dim(name, min=1, max=_MOST_TOKENS) for name in names}
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    dynamic = tuple(
        {0: batch} | {at: axes[axis] for at, axis in enumerate(shape, 1) if isinstance(axis, str)}
        for shape in inputs.values()
    )
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module,
            examples,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic,
            opset_version=18,
            dynamo=True,
            custom_translation_table={
                torch.ops.aten.scaled_dot_product_attention.default: _attention_nodes
            },
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    model = program.model
    for tidy in (
        passes.CommonSubexpressionEliminationPass(),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
    ):
        model = tidy(model).model
    _name_after_modules(model)
    model.metadata_props.update({"foveate.version": __version__, "torch": torch.__version__})
    return model


def note_reducer(model: ir.Model, reducer: Reducer, tokens: int) -> None:
    """Write into a model which reducer is in it."""
    model.metadata_props.update(
        {
            "foveate.reducer": reducer.name,
            "foveate.reducer_options": json.dumps(reducer.options),
            "foveate.tokens": str(tokens),
        }
    )


def _attention_nodes(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """Write `scaled_dot_product_attention` as the five nodes that runtimes fuse again.

    PyTorch's own translation scales queries and keys both and reshapes around the transposition,
    which hides the pattern from ONNX Runtime.
    """
    if options:
        raise NotImplementedError(f"attention of a vision tower takes no {', '.join(options)}")
    scale: Any = op.Constant(value_float=float(query.shape[-1]) ** -0.5)
    logits = op.MatMul(op.Mul(query, scale), op.Transpose(key, perm=[0, 1, 3, 2]))  # [B, H, S, S]
    return op.MatMul(op.Softmax(logits, axis=-1), value)  # [B, H, S, d]


def _name_after_modules(model: ir.Model) -> None:
    """Name every node and weight after the module it came from, and keep that as metadata.

    What else the exporter wrote about a node (source lines, stack traces) is dropped: it names
    files of the machine the export ran on.
    """
    taken: Counter[str] = Counter()
    for node in model.graph:
        module = _traced_module(node)
        base = f"{module}/{node.op_type}" if module else node.op_type
        taken[base] += 1
        node.name = base if taken[base] == 1 else f"{base}_{taken[base] - 1}"
        node.metadata_props.clear()
        node.metadata_props[MODULE_KEY] = module
        node.doc_string = None
        for number, output in enumerate(node.outputs):
            output.metadata_props.clear()
            if not output.is_graph_output():
                output.name = f"{node.name}:{number}"
    _name_weights(model, taken)
    model.graph.doc_string = model.doc_string = None
    model.graph.name = "vision"
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _name_weights(model: ir.Model, taken: Counter[str]) -> None:
    for weight in list(model.graph.initializers.values()):
        weight.metadata_props.clear()
        node = next(iter(weight.uses())).node
        module = node.metadata_props[MODULE_KEY]
        kind = "weight" if node.op_type in ("MatMul", "Gemm", "Conv") else "constant"
        if str(weight.name).startswith(module + ".") and "." in str(weight.name):
            continue
        base = f"{module}.{kind}" if module else kind
        taken[base] += 1
        weight.name = base if taken[base] == 1 else f"{base}_{taken[base] - 1}"


def _traced_module(node: ir.Node) -> str:
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is not None:
        path: list[str] = ast.literal_eval(scopes)[:-1]  # the last one is the operation
        modules = [scope for scope in path if not scope.startswith("_")]
        return modules[-1] if modules else ""
    # A pass made this node; it belongs to whatever it continues.
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return source.metadata_props.get(MODULE_KEY, "") if source is not None else ""


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warnings about packages and classes that are not ours."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
