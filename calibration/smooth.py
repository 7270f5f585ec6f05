"""SmoothQuant: outlying channels of an activation become a matter of the weights.

Enters: a norm, the matrices that read it, and how large each channel of its output grows. Leaves:
one scale per channel, by which the norm's gamma and beta are divided and the matrices' rows are
multiplied. In floating point nothing changes; in INT8 one scale then fits the whole activation.

Xiao et al. 2023 (arXiv 2211.10438), eq. 4: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha). Deviations:
alpha is searched for each norm instead of being 0.5 for all, by the error of what its layers put
out; scales are divided by their geometric mean, which per-tensor quantization does not notice and
which keeps the activation's magnitude for layers that stay in float16; a channel that is zero in
activation or weights keeps the scale 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.layers import Site, array_of
from calibration.modules import MODULE_KEY, module_of
from calibration.ranges import LEVELS, Method, count_magnitudes, find_threshold

Matrix = NDArray[np.float32]
Vector = NDArray[np.float32]

_BINS = 2048


@dataclass(frozen=True)
class Trial:
    """One way to quantize a site, and what it costs.

    Attributes:
        alpha: of eq. 4, None for no smoothing.
        scales: float32[K].
        error: squared error of the layers' outputs relative to their square.
    """

    alpha: float | None
    scales: Vector
    error: float


def smoothing_scales(activation: Vector, weight: Vector, alpha: float) -> Vector:
    """Return eq. 4 with a geometric mean of one.

    Args:
        activation: float32[K]; max|X_j| of each channel.
        weight: float32[K]; max|W_j| over all matrices that read the channel.
        alpha: 0 leaves the outliers in the activation, 1 moves all of them into the weights.
    """
    alive = (activation > 0) & (weight > 0)
    if not alive.any():
        return np.ones_like(activation)
    x, w = (np.where(alive, v, 1.0).astype(np.float64) for v in (activation, weight))
    logarithms = alpha * np.log(x) - (1 - alpha) * np.log(w)
    logarithms -= logarithms[alive].mean()
    return np.where(alive, np.exp(logarithms), 1.0).astype(np.float32)


def search_alpha(
    sample: Matrix,
    largest: Vector,
    matrices: Sequence[Matrix],
    alphas: Sequence[float],
    method: Method,
    percentile: float,
) -> list[Trial]:
    """Try every alpha, and no smoothing, on a sample of an activation.

    Args:
        sample: float32[R, K]; rows of the activation.
        largest: float32[K]; max|X_j| over all frames.
        matrices: the weights that read it, float32[K, N] each.
        alphas: what to try.
        method: how the range of the smoothed activation is chosen.
        percentile: for the method of that name.

    Returns:
        The trial without smoothing first, then one for each alpha.
    """
    joined = np.concatenate(matrices, axis=1)  # [K, sum of N]
    exact = sample @ joined  # [R, sum of N]
    power = float(np.square(exact, dtype=np.float64).sum()) or 1.0
    reach = np.abs(joined).max(axis=1)

    def attempt(alpha: float | None) -> Trial:
        scales = np.ones_like(largest) if alpha is None else smoothing_scales(largest, reach, alpha)
        smoothed = sample / scales
        top = float((largest / scales).max())
        counts = count_magnitudes(smoothed, top, _BINS)
        threshold = find_threshold(counts, top, method, percentile)
        product = fake_quantize(smoothed, threshold) @ fake_quantize(
            joined * scales[:, None], np.abs(joined * scales[:, None]).max(axis=0)
        )
        error = float(np.square(product - exact, dtype=np.float64).sum())
        return Trial(alpha, scales, error / power)

    return [attempt(None), *(attempt(alpha) for alpha in alphas)]


def fake_quantize(values: Matrix, threshold: float | Vector) -> Matrix:
    """Round values to symmetric INT8 and back; one threshold, or one for each column."""
    scale = np.maximum(np.asarray(threshold, np.float32), np.finfo(np.float32).tiny) / LEVELS
    return np.asarray(np.clip(np.round(values / scale), -LEVELS, LEVELS) * scale, np.float32)


def fold_smoothing(graph: ir.Graph, site: Site, scales: Vector) -> None:
    """Divide a norm's output by `scales` and multiply the rows of the matrices that read it.

    Whatever else reads the norm (PruMerge's scores can share one with a layer) keeps it as it was:
    the layers then get a norm of their own. Weights that are shared stay whole for the others too.

    Args:
        graph: that the site is part of.
        site: with a norm.
        scales: float32[K].
    """
    norm = site.norm
    if norm is None:
        raise RuntimeError(f"{site.name} is not fed by a LayerNormalization")
    readers = {layer.node for layer in site.layers}
    if any(use.node not in readers for use in site.source.uses()) or site.source.is_graph_output():
        norm = _twin_norm(graph, norm)
        for layer in site.layers:
            layer.node.replace_input_with(0, norm.outputs[0])
    for index, kind in ((1, "weight"), (2, "bias")):
        vector = norm.inputs[index] if index < len(norm.inputs) else None
        if vector is not None:
            smoothed = array_of(vector) / scales
            replace_weight(graph, norm, index, smoothed, f"{site.name}.{kind}.smoothed")
    for layer in site.layers:
        weight = array_of(layer.weight)
        rows = scales[:, None] if layer.output_axis == 1 else scales[None, :]
        replace_weight(graph, layer.node, 1, weight * rows, f"{layer.name}.weight.smoothed")


def replace_weight(
    graph: ir.Graph, node: ir.Node, index: int, array: NDArray[np.generic], name: str
) -> ir.Value:
    """Give a node another weight; the old one goes when nothing reads it any more."""
    old = node.inputs[index]
    new = add_weight(graph, array, name)
    node.replace_input_with(index, new)
    if old is not None and old.is_initializer() and old.name and not old.uses():
        del graph.initializers[old.name]
    return new


def add_weight(graph: ir.Graph, array: NDArray[np.generic], name: str) -> ir.Value:
    """Add a constant to a graph."""
    tensor = ir.tensor(np.array(array, order="C"), name=name)
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _twin_norm(graph: ir.Graph, norm: ir.Node) -> ir.Node:
    twin = ir.node("LayerNormalization", list(norm.inputs), name=f"{norm.name}_smoothed")
    for attribute in norm.attributes.values():
        twin.attributes.add(attribute)
    twin.metadata_props[MODULE_KEY] = module_of(norm)
    source, output = norm.outputs[0], twin.outputs[0]
    output.name, output.type, output.shape = f"{twin.name}:0", source.type, source.shape
    graph.insert_after(norm, twin)
    return twin
