"""Quantize the two products of attention, Q K^T and softmax V, where TensorRT fuses them in 8 bits.

TensorRT 10.6 computes a whole attention in FP8 if all four operands of its products are: heads of
at most 64 channels and at most 3072 positions on Ada. One that is larger stays in float16. The
weights of the softmax need no statistics: they end at 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.scales.calibration_file import AttentionRecord, Calibration, Smoothing
from calibration.scales.insert_qdq import add_constant, half_exact, insert_pair
from calibration.scales.layers import SCORES, TOWER
from calibration.scales.number_format import NumberFormat
from graphs.modules import is_inside, module_of

LARGEST_HEAD = 64
LARGEST_SEQUENCE = 3072
_HEAD_STEP = 16


@dataclass(frozen=True)
class Attention:
    """An attention of the tower.

    Attributes:
        name: the module it was traced from.
        scores: the product of queries [B, H, S, D] and keys [B, H, D, S].
        means: the product of the softmax [B, H, S, S] and values [B, H, S, D].
    """

    name: str
    scores: ir.Node
    means: ir.Node

    @property
    def queries(self) -> ir.Value:
        """Scaled already, float32[B, H, S, D]."""
        return _input(self.scores, 0)

    @property
    def keys(self) -> ir.Value:
        """float32[B, H, D, S]."""
        return _input(self.scores, 1)

    @property
    def values(self) -> ir.Value:
        """float32[B, H, S, D]."""
        return _input(self.means, 1)

    @property
    def is_small(self) -> bool:
        """Whether TensorRT fuses it in FP8."""
        shape = self.values.shape
        if shape is None or len(shape) != 4:
            return False
        positions, channels = shape[2], shape[3]
        return (
            isinstance(positions, int)
            and isinstance(channels, int)
            and positions <= LARGEST_SEQUENCE
            and channels <= LARGEST_HEAD
            and channels % _HEAD_STEP == 0
        )


@dataclass(frozen=True)
class AttentionRange:
    """Extremes of what an attention's products read.

    Attributes:
        query: largest magnitude.
        key: largest magnitude.
        lowest: float32[H * D]; of each channel of the values.
        highest: float32[H * D].
    """

    query: float
    key: float
    lowest: NDArray[np.float32]
    highest: NDArray[np.float32]

    def record(self, smoothing: Smoothing | None) -> AttentionRecord:
        """Return it as it is once the values are smoothed for the layer that reads their means."""
        ends = np.stack([self.lowest, self.highest])
        if smoothing is not None:
            ends = (ends - smoothing.shift) / smoothing.scale
        return AttentionRecord(
            query=self.query, key=self.key, value=float(np.abs(ends).max(initial=0.0))
        )


def find_attentions(model: ir.Model) -> list[Attention]:
    """Return the attentions of the tower, in the graph's order, the scores' own left out."""
    found = []
    for node in model.graph:
        module = module_of(node)
        if node.op_type != "Softmax" or not is_inside(module, TOWER) or is_inside(module, SCORES):
            continue
        scores = _input(node, 0).producer()
        readers = [use.node for use in node.outputs[0].uses()]
        if scores is None or scores.op_type != "MatMul" or len(readers) != 1:
            continue
        if readers[0].op_type == "MatMul" and readers[0].inputs[0] is node.outputs[0]:
            found.append(Attention(module, scores, readers[0]))
    return found


def quantize_attentions(model: ir.Model, calibration: Calibration, form: NumberFormat) -> list[str]:
    """Put Q/DQ at the products of the attentions that are known and small enough, in place.

    One with a projection that stays in floating point stays so too: it was found too sensitive.

    Other readers of queries, keys and values, such as the scores, keep the float values.

    Returns:
        The modules of those that were quantized.
    """
    done = []
    for one in find_attentions(model):
        record = calibration.attentions.get(one.name)
        given_back = any(is_inside(layer, (one.name,)) for layer in calibration.excluded)
        if record is None or given_back or not one.is_small:
            continue
        places = (
            (one.scores, 0, "query", record.query),
            (one.scores, 1, "key", record.key),
            (one.means, 0, "weights", 1.0),
            (one.means, 1, "value", record.value),
        )
        zero = add_constant(model.graph, form.zero, f"{one.name}.zero_point")
        for node, index, what, reach in places:
            scale = half_exact(np.float32(reach / form.largest))
            constant = add_constant(model.graph, scale, f"{one.name}.{what}_scale")
            floats = insert_pair(node, one.name, _input(node, index), constant, zero, what)
            node.replace_input_with(index, floats)
        done.append(one.name)
    return done


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise RuntimeError(f"{node.name} lacks input {index}")
    return value
