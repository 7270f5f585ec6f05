"""Let a graph compute the statistics of its activations, so that none has to leave it.

The activations of one picture are 390 MB at CLIP-L/14-336 size; what calibration needs of them is
each channel's extremes and sum, and a few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.scales.attention import Attention, AttentionRange
from calibration.scales.layers import Site

CHOSEN = "chosen_rows"
"""Input of a graph with statistics, int64[C]: which rows to sample, modulo their number."""


@dataclass(frozen=True)
class Statistics:
    """What one picture adds to what is known of an activation of R rows.

    Attributes:
        lowest: float32[K]; of each channel.
        highest: float32[K].
        total: float32[K]; the sum over rows.
        rows: R.
        sample: float32[S, K]; some of the rows.
        weight: float32[S]; how many rows each of these stands for.
    """

    lowest: NDArray[np.float32]
    highest: NDArray[np.float32]
    total: NDArray[np.float32]
    rows: int
    sample: NDArray[np.float32]
    weight: NDArray[np.float32]


def add_statistics(
    model: ir.Model, sites: Sequence[Site], attentions: Sequence[Attention] = ()
) -> None:
    """Replace the outputs of a graph by statistics of the activations it computes.

    Args:
        model: of opset 17 or later.
        sites: of the graph.
        attentions: of the graph.
    """
    graph, opset = model.graph, model.opset_imports[""]
    chosen = ir.Value(
        name=CHOSEN, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["chosen_rows"])
    )
    graph.inputs.append(chosen)
    zero = _constant(graph, 0)
    graph.outputs[:] = [
        output
        for number, site in enumerate(sites)
        for output in _Taps(graph, opset, number, chosen, zero).measure(site.source)
    ] + [
        output
        for number, one in enumerate(attentions)
        for output in _Taps(graph, opset, number, chosen, zero).measure_attention(one)
    ]


def read_statistics(outputs: dict[str, NDArray[Any]], number: int) -> Statistics:
    """Return what a graph with statistics says of a site.

    Args:
        outputs: of one picture.
        number: of the site, in the order given to `add_statistics`.
    """
    lowest, highest, total, rows, sample = (outputs[name] for name in _names(number))
    weight = np.ones(len(sample), np.float32)
    weight[2:] = max(int(rows[0]) - 2, 0) / max(len(sample) - 2, 1)
    return Statistics(lowest, highest, total, int(rows[0]), sample, weight)


def read_attention(outputs: dict[str, NDArray[Any]], number: int) -> AttentionRange:
    """Return what a graph with statistics says of an attention.

    Args:
        outputs: of one picture.
        number: of the attention, in the order given to `add_statistics`.
    """
    query, key, lowest, highest = (outputs[name] for name in _attention_names(number))
    return AttentionRange(float(query), float(key), lowest.ravel(), highest.ravel())


@dataclass(frozen=True)
class _Taps:
    """Adds the statistics of one activation at the end of a graph."""

    graph: ir.Graph
    opset: int
    number: int
    chosen: ir.Value
    zero: ir.Value

    def measure(self, source: ir.Value) -> list[ir.Value]:
        rows = self._add("Flatten", [source], axis=-1)  # [R, K]
        count = self._add("Shape", [rows], start=0, end=1)
        reach = self._reduce("ReduceMax", self._add("Abs", [rows]), 1)  # [R]
        # The first row is the class token, which chooses patches; the largest decides the range.
        largest = self._add("ArgMax", [reach], axis=0, keepdims=1)
        others = self._add("Mod", [self.chosen, count])
        places = self._add("Concat", [self.zero, largest, others], axis=0)
        found = [
            self._reduce("ReduceMin", rows, 0),
            self._reduce("ReduceMax", rows, 0),
            self._reduce("ReduceSum", rows, 0),
            count,
            self._add("Gather", [rows, places], axis=0),
        ]
        for value, name in zip(found, _names(self.number), strict=True):
            value.name = name
            kind = ir.DataType.INT64 if value is count else ir.DataType.FLOAT
            value.type = ir.TensorType(kind)
        return found

    def measure_attention(self, one: Attention) -> list[ir.Value]:
        found = [
            self._add("ReduceMax", [self._add("Abs", [one.queries])], keepdims=0),
            self._add("ReduceMax", [self._add("Abs", [one.keys])], keepdims=0),
            self._reduce("ReduceMin", self._reduce("ReduceMin", one.values, 2), 0),  # [H, D]
            self._reduce("ReduceMax", self._reduce("ReduceMax", one.values, 2), 0),
        ]
        for value, name in zip(found, _attention_names(self.number), strict=True):
            value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
        return found

    def _reduce(self, operator: str, value: ir.Value, axis: int) -> ir.Value:
        if self.opset < 18 and operator != "ReduceSum":
            return self._add(operator, [value], axes=[axis], keepdims=0)
        return self._add(operator, [value, _constant(self.graph, axis)], keepdims=0)

    def _add(
        self, operator: str, inputs: Sequence[ir.Value], **attributes: int | list[int]
    ) -> ir.Value:
        node = ir.node(operator, inputs, attributes)
        self.graph.append(node)
        return node.outputs[0]


def _names(number: int) -> tuple[str, ...]:
    return tuple(f"{what}/{number}" for what in ("lowest", "highest", "total", "rows", "sample"))


def _attention_names(number: int) -> tuple[str, ...]:
    return tuple(f"{what}/{number}" for what in ("query", "key", "value_lowest", "value_highest"))


def _constant(graph: ir.Graph, number: int) -> ir.Value:
    """Return the constant int64[1], which is added to the graph at first need."""
    name = f"statistics_constant_{number}"
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(np.array([number], np.int64), name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        graph.register_initializer(value)
    return graph.initializers[name]
