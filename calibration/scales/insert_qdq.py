"""Insert smoothing and Q/DQ into a graph, site by site.

Q/DQ stand only at the inputs of the quantized layers. Other readers of the same activation, or of
an equal weight that is stored once, keep the float value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.scales.layers import Layer, Site, array_of
from calibration.scales.number_format import NumberFormat
from graphs.modules import MODULE_KEY, module_of

Vector = NDArray[np.float32]
Attribute = int | float


def smooth_site(graph: ir.Graph, site: Site, shift: Vector, scale: Vector) -> None:
    """Let the layers of a site read (X - shift) / scale, and compute what they did.

    A norm takes both into its gamma and beta, attention into the projection of its values. Where
    neither makes the activation a Mul and an Add do it, which TensorRT joins with the pointwise
    operators before them.

    Args:
        graph: that the site is part of.
        site: whose layers are changed.
        shift: float32[K].
        scale: float32[K].
    """
    if site.norm is not None:
        smoothed = _smooth_norm(graph, site, site.norm, shift, scale)
    elif site.values is not None:
        smoothed = _smooth_values(graph, site, site.values, shift, scale)
    else:
        smoothed = _smooth_value(graph, site, shift, scale)
    for layer in site.layers:
        layer.node.replace_input_with(0, smoothed)
        moved = shift @ layer.matrix()  # [N]
        rows = scale[:, None] if layer.output_axis == 1 else scale[None, :]
        _replace(graph, layer.node, 1, array_of(layer.weight) * rows, f"{layer.name}.smoothed")
        _change_bias(graph, layer, moved)


def quantize_site(
    graph: ir.Graph, layers: Sequence[Layer], reach: float, mean: Vector, form: NumberFormat
) -> None:
    """Put Q/DQ around the layers that read one activation.

    Args:
        graph: that they are part of.
        layers: reading one activation, smoothed already.
        reach: magnitude of the activation that becomes the format's largest.
        mean: float32[K]; of each channel of it. What rounded weights make of that beyond what exact
            ones do is taken off the bias.
        form: what to quantize to.
    """
    first, source = layers[0], layers[0].source
    step = half_exact(np.float32(reach / form.largest))
    scale = add_constant(graph, step, f"{first.name}.input_scale")
    zero = add_constant(graph, form.zero, f"{first.name}.input_zero_point")
    largest = max(float(np.abs(layer.matrix()).max()) for layer in layers)
    for layer in layers:
        # A pair for each product: ONNX Runtime fuses none that several products share.
        floats = insert_pair(layer.node, layer.name, source, scale, zero, "input")
        layer.node.replace_input_with(0, floats)
        _quantize_weight(graph, layer, mean, largest, form)


def insert_pair(
    node: ir.Node, module: str, source: ir.Value, scale: ir.Value, zero: ir.Value, what: str
) -> ir.Value:
    """Put Q and DQ of a value before a node that is to read it, and return what DQ makes.

    Args:
        node: the reader; its input is not replaced.
        module: whose the pair is.
        source: float32 of any shape.
        scale: a scalar.
        zero: a scalar of the type to quantize to.
        what: for the names.
    """
    small = _insert(node, module, "QuantizeLinear", [source, scale, zero], what)
    return _insert(node, module, "DequantizeLinear", [small, scale, zero], what)


def half_exact(scale: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    """Round scales up to a float16, so that a graph in float16 has the same integers; 0 becomes 1.

    Args:
        scale: float32 of any shape, 65504 at most.
    """
    half = np.asarray(scale).astype(np.float16)
    half = np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half)
    return np.where(half > 0, half, np.float16(1)).astype(np.float32)


def _quantize_weight(
    graph: ir.Graph, layer: Layer, mean: Vector, largest: float, form: NumberFormat
) -> None:
    """Store a weight in 8 bits with a scale for each channel it makes.

    Args:
        graph: that the layer is part of.
        layer: whose weight it is.
        mean: float32[K]; of the activation.
        largest: magnitude among all weights that read the activation.
        form: what to store.
    """
    weight, axis = layer.weight, layer.output_axis
    array, exact = array_of(weight), layer.matrix()
    reach = np.abs(exact).max(axis=0)  # [N]
    shares = half_exact(reach / np.float32(largest or 1))  # [N]
    if form.one_scale:
        scale = half_exact(np.float32(largest / form.largest))
        scales = scale * shares
    else:
        scale = scales = half_exact(reach / np.float32(form.largest))
    along = scales.reshape([-1 if index == axis else 1 for index in range(array.ndim)])
    small = form.encode(array / along)
    zeros = np.broadcast_to(form.zero, scale.shape)
    inputs = [
        add_constant(graph, small, f"{layer.name}.weight.{form.name}"),
        add_constant(graph, scale, f"{layer.name}.weight.scale"),
        add_constant(graph, zeros, f"{layer.name}.weight.zero_point"),
    ]
    along_axis = {} if form.one_scale else {"axis": axis}
    floats = _insert(layer.node, layer.name, "DequantizeLinear", inputs, "weight", **along_axis)
    floats.shape = weight.shape
    layer.node.replace_input_with(1, floats)
    _forget(graph, weight)
    rounded: Vector = form.encode(exact / scales).astype(np.float32) * scales  # [K, N]
    error: Vector = mean @ (rounded - exact)  # [N]
    _change_bias(graph, layer, -error)
    if form.one_scale:
        _multiply_channels(graph, layer, shares)


def _multiply_channels(graph: ir.Graph, layer: Layer, shares: Vector) -> None:
    """Multiply each channel of a product, before its bias is added; TensorRT joins the two.

    Args:
        graph: that the layer is part of.
        layer: a matrix product; of a Gemm the bias becomes an Add of its own.
        shares: float32[N].
    """
    output = layer.node.outputs[0]
    uses = list(output.uses())
    factor = add_constant(graph, shares, f"{layer.name}.weight.channels")
    made = ir.node("Mul", [output, factor], name=f"{layer.name}/Mul_channels")
    made.metadata_props[MODULE_KEY] = layer.name
    _describe(made, output.type, output.shape)
    graph.insert_after(layer.node, made)
    last = made
    if layer.node.op_type == "Gemm" and len(layer.node.inputs) > 2:
        bias = _input(layer.node, 2)
        layer.node.resize_inputs(2)
        last = ir.node("Add", [made.outputs[0], bias], name=f"{layer.name}/Add_bias")
        last.metadata_props[MODULE_KEY] = layer.name
        _describe(last, output.type, output.shape)
        graph.insert_after(made, last)
    for use in uses:
        use.node.replace_input_with(use.idx, last.outputs[0])


def _smooth_norm(
    graph: ir.Graph, site: Site, norm: ir.Node, shift: Vector, scale: Vector
) -> ir.Value:
    readers = {layer.node for layer in site.layers}
    if any(use.node not in readers for use in site.source.uses()) or site.source.is_graph_output():
        # PruMerge's scores can share a norm with a layer: the layers get one of their own.
        norm = _twin(graph, norm)
    gamma = _input(norm, 1)
    beta = norm.inputs[2] if len(norm.inputs) > 2 else None
    old_beta = array_of(beta) if beta is not None else np.zeros_like(shift)
    _replace(graph, norm, 1, array_of(gamma) / scale, f"{site.name}.smoothed.weight")
    if beta is None:
        norm.resize_inputs(3)
    _replace(graph, norm, 2, (old_beta - shift) / scale, f"{site.name}.smoothed.bias")
    return norm.outputs[0]


def _smooth_values(
    graph: ir.Graph, site: Site, values: Layer, shift: Vector, scale: Vector
) -> ir.Value:
    columns = scale[None, :] if values.output_axis == 1 else scale[:, None]
    weight = array_of(values.weight) / columns
    _replace(graph, values.node, 1, weight, f"{values.name}.smoothed_values")
    _change_bias(graph, values, -shift / scale, factor=np.float32(1) / scale)
    return site.source


def _smooth_value(graph: ir.Graph, site: Site, shift: Vector, scale: Vector) -> ir.Value:
    first = site.layers[0]
    factor = add_constant(graph, 1 / scale, f"{first.name}.input_factor")
    offset = add_constant(graph, -shift / scale, f"{first.name}.input_offset")
    scaled = _insert(first.node, first.name, "Mul", [site.source, factor], "smooth")
    return _insert(first.node, first.name, "Add", [scaled, offset], "smooth")


def _twin(graph: ir.Graph, norm: ir.Node) -> ir.Node:
    attributes = list(norm.attributes.values())
    name = f"{norm.name}_smoothed"
    twin = ir.Node("", "LayerNormalization", list(norm.inputs), attributes, name=name)
    twin.metadata_props[MODULE_KEY] = module_of(norm)
    source, output = norm.outputs[0], twin.outputs[0]
    output.name, output.type, output.shape = f"{name}:0", source.type, source.shape
    graph.insert_after(norm, twin)
    return twin


def _change_bias(
    graph: ir.Graph, layer: Layer, added: Vector, factor: Vector | float = 1.0
) -> None:
    """Let the bias of a layer be ``bias * factor + added``, where it has none by an Add.

    Args:
        graph: that the layer is part of.
        layer: a matrix product followed by the addition of its bias.
        added: float32[N].
        factor: float32[N].
    """
    name = f"{layer.name}.bias.changed"
    node, index = layer.node, 2
    if node.op_type == "MatMul":
        output = node.outputs[0]
        uses = list(output.uses())
        sums = [use for use in uses if use.node.op_type == "Add"]
        if len(uses) == 1 and sums and _is_constant(sums[0].node.inputs[1 - sums[0].idx]):
            node, index = sums[0].node, 1 - sums[0].idx
        else:
            constant = add_constant(graph, added, name)
            node = ir.node("Add", [output, constant], name=f"{layer.name}/Add_bias")
            node.metadata_props[MODULE_KEY] = layer.name
            _describe(node, output.type, output.shape)
            graph.insert_after(layer.node, node)
            for use in uses:
                use.node.replace_input_with(use.idx, node.outputs[0])
            return
    elif len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    bias = node.inputs[index]
    _replace(graph, node, index, added if bias is None else array_of(bias) * factor + added, name)


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _insert(
    reader: ir.Node,
    module: str,
    operator: str,
    inputs: Sequence[ir.Value],
    what: str,
    **attributes: Attribute,
) -> ir.Value:
    """Put a node of a module before the one that will read it, and return its output."""
    node = ir.node(operator, inputs, attributes, name=f"{module}/{operator}_{what}")
    node.metadata_props[MODULE_KEY] = module
    kind = inputs[2].dtype if operator == "QuantizeLinear" else ir.DataType.FLOAT
    graph = reader.graph
    if graph is None or kind is None:
        raise RuntimeError(f"{module} is not part of a graph, or a zero point has no type")
    _describe(node, ir.TensorType(kind), inputs[0].shape)
    graph.insert_before(reader, node)
    return node.outputs[0]


def _describe(node: ir.Node, kind: Any, shape: ir.Shape | None) -> None:
    output = node.outputs[0]
    output.name, output.type, output.shape = f"{node.name}:0", kind, shape


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: NDArray[Any], name: str) -> None:
    """Give a node another weight; the old one goes when nothing reads it any more."""
    old = node.inputs[index]
    node.replace_input_with(index, add_constant(graph, array.astype(np.float32), name))
    if old is not None:
        _forget(graph, old)


def add_constant(graph: ir.Graph, array: Any, name: str) -> ir.Value:
    """Add a constant, under a name that is not taken."""
    while name in graph.initializers:
        name += "_"
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(np.shape(array)), name=name)
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(np.shape(array)),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _forget(graph: ir.Graph, value: ir.Value) -> None:
    if value.is_initializer() and value.name and not value.uses():
        del graph.initializers[value.name]


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise RuntimeError(f"{node.name} lacks input {index}")
    return value
