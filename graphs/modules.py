"""Find the module of the model that a node of a vision graph was traced from.

The exporter writes it into every node's metadata. The quantizer, the float16 converter and the
graph check read it, because the tower's nodes are treated otherwise than the reducer's.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

MODULE_KEY = "foveate.module"
"""Metadata of every node: the module it was traced from, such as ``tower.layers.3.mlp.fc1``."""


def module_of(node: ir.Node) -> str:
    """Return the module a node was traced from; by its name where it has no metadata."""
    module = node.metadata_props.get(MODULE_KEY)
    return module if module is not None else (node.name or "").rpartition("/")[0]


def is_inside(module: str, outer: Sequence[str]) -> bool:
    """Return whether a module is one of `outer` or lies within one."""
    return any(module == name or module.startswith(name + ".") for name in outer)
