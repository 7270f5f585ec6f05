"""Find the layers of a vision graph that are worth quantizing, and the norms that feed them.

These are the tower's matrix products with weights. The patch convolution has 0.2 % of the work at
CLIP-L's size and stays in float: rounding the pixels costs more than that saves. Attention's own
products and the scores need the range of float. Rounding in the reducer would keep other patches.
The projector sees few tokens, and their range depends on the reducer, so one calibration could not
serve all graphs of a bundle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.errors import CalibrationError
from graphs.modules import is_inside, module_of

TOWER = ("tower",)
SCORES = ("tower.scores",)
_OPERATORS = ("Gemm", "MatMul")


@dataclass(frozen=True)
class Layer:
    """A matrix product with weights.

    Attributes:
        name: the module it was traced from.
        node: its node; input 0 is the activation, input 1 the weight.
    """

    name: str
    node: ir.Node

    @property
    def source(self) -> ir.Value:
        """The activation it reads."""
        return _input(self.node, 0)

    @property
    def weight(self) -> ir.Value:
        """Its weight, float32[K, N], or float32[N, K] where it is transposed."""
        return _input(self.node, 1)

    @property
    def output_axis(self) -> int:
        """Axis of the weight along the channels it makes."""
        return 0 if _is_transposed(self.node) else 1

    def matrix(self) -> NDArray[np.float32]:
        """Return the weight as float32[K, N], activation times matrix being the product."""
        weight = array_of(self.weight)
        return np.asarray(weight if self.output_axis == 1 else weight.T, np.float32)

    def digest(self) -> str:
        """Return the sha256 of its weight."""
        return hashlib.sha256(np.ascontiguousarray(array_of(self.weight)).tobytes()).hexdigest()


@dataclass(frozen=True)
class Site:
    """Layers that read one activation, quantized together.

    Attributes:
        name: the norm that makes the activation, or the layer that reads it alone.
        source: the activation, float32[..., K].
        layers: who reads it.
        norm: the LayerNormalization whose output it is.
        values: the layer whose outputs it is attention's weighted means of.
    """

    name: str
    source: ir.Value
    layers: tuple[Layer, ...]
    norm: ir.Node | None = None
    values: Layer | None = None

    @property
    def foldable(self) -> bool:
        """Whether a shift and a scale of each channel cost no node of their own."""
        return self.norm is not None or self.values is not None


def find_layers(model: ir.Model) -> list[Layer]:
    """Return the layers of a graph that are to be quantized, in the graph's order.

    Raises:
        CalibrationError: there is none, or the graph is not a float32 graph.
    """
    found = [Layer(module_of(node), node) for node in model.graph if _is_layer(node)]
    if not found:
        raise CalibrationError(
            "The graph has no matrix product with float32 weights inside the module "
            "`tower`, expected a float32 vision graph as `python -m export.build --precision fp32` "
            "writes it. One that is float16 or quantized already cannot be calibrated."
        )
    return found


def find_sites(model: ir.Model) -> list[Site]:
    """Return the same layers grouped by the activation they read.

    Raises:
        CalibrationError: as `find_layers`.
    """
    found = find_layers(model)
    by_node = {layer.node: layer for layer in found}
    readers: dict[ir.Value, list[Layer]] = {}
    for layer in found:
        readers.setdefault(layer.source, []).append(layer)
    sites = []
    for source, layers in readers.items():
        producer = source.producer()
        norm = producer if producer is not None and _is_foldable(producer) else None
        name = module_of(norm) if norm is not None else layers[0].name
        values = _find_values(source, by_node)
        sites.append(Site(name, source, tuple(layers), norm, values))
    return sites


def array_of(value: ir.Value) -> NDArray[Any]:
    """Return what a weight holds."""
    if value.const_value is None:
        raise RuntimeError(f"{value.name} is not a constant")
    return value.const_value.numpy()


def _is_layer(node: ir.Node) -> bool:
    module = module_of(node)
    if node.op_type not in _OPERATORS or not is_inside(module, TOWER) or is_inside(module, SCORES):
        return False
    weight = node.inputs[1]
    return weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.FLOAT


def _is_foldable(norm: ir.Node) -> bool:
    return norm.op_type == "LayerNormalization" and all(
        value is not None and value.is_initializer() for value in norm.inputs[1:]
    )


def _find_values(source: ir.Value, layers: Mapping[ir.Node, Layer]) -> Layer | None:
    """Return the value projection of the attention that makes `source`.

    Between the two are the split into heads, softmax(Q K^T) V and the heads joined again; the rows
    of a softmax add up to one, so that what is done to a channel of V is done to that of the means.
    """
    attended = _behind(source, ("Reshape", "Transpose"))
    if attended is None or attended.op_type != "MatMul":
        return None
    weights = _behind(attended.inputs[0], ())
    added = _behind(attended.inputs[1], ("Reshape", "Transpose"))
    if weights is None or weights.op_type != "Softmax" or added is None or added.op_type != "Add":
        return None
    made = [layers[node] for node in added.predecessors() if node in layers]
    return next((layer for layer in made if len(layer.node.outputs[0].uses()) == 1), None)


def _behind(value: ir.Value | None, passed: tuple[str, ...]) -> ir.Node | None:
    """Return what makes a value, looking through operators that nothing else reads."""
    while value is not None and len(value.uses()) == 1:
        node = value.producer()
        if node is None or node.op_type not in passed:
            return node
        value = node.inputs[0]
    return None


def _is_transposed(node: ir.Node) -> bool:
    attribute = node.attributes.get("transB")
    return attribute is not None and bool(attribute.as_int())


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise RuntimeError(f"{node.name} lacks input {index}")
    return value
