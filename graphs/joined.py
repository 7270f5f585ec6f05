"""Join the files that run one after the other for a budget into one graph, as if it were whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes


def load_joined(files: Sequence[Path]) -> ir.Model:
    """Return the graph of a budget.

    What is handed from file to file is no output of it, nor what the first file makes for others.

    Args:
        files: in the order they run. Each reads outputs of those before by their names.
    """
    model, *others = (ir.load(file) for file in files)
    if not others:
        return model
    first = set(model.graph.outputs)
    for other in others:
        _append(model, other)
    kept = [value for value in model.graph.outputs if value not in first]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    return passes.RemoveUnusedNodesPass()(model).model


def _append(model: ir.Model, other: ir.Model) -> None:
    graph, added = model.graph, other.graph
    handed = {value.name: value for value in graph.outputs}
    taken = {node.name for node in graph} | {value.name for node in graph for value in node.outputs}
    taken |= set(graph.initializers)
    read = {value.name: value for value in added.inputs}
    for name, value in read.items():
        value.replace_all_uses_with(handed[name])
    outputs = [value for value in graph.outputs if value.name not in read]
    kept_names = {value.name for value in added.outputs}
    for name, weight in list(added.initializers.items()):
        del added.initializers[name]
        if name in taken:
            weight.name = _free_name(str(name), taken)
        graph.register_initializer(weight)
        taken.add(weight.name)
    outputs.extend(added.outputs)
    added.outputs.clear()
    for node in list(added):
        added.remove(node)
        if node.name in taken:
            node.name = _free_name(str(node.name), taken)
        for value in node.outputs:
            if value.name in taken and value.name not in kept_names:
                value.name = _free_name(str(value.name), taken)
        taken |= {node.name, *(value.name for value in node.outputs)}
        graph.append(node)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    model.metadata_props.update(other.metadata_props)


def _free_name(name: str, taken: set[str | None]) -> str:
    number = 1
    while f"{name}.{number}" in taken:
        number += 1
    return f"{name}.{number}"
