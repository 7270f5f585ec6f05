"""The 8-bit numbers that layers are computed in: INT8, or float8 E4M3 (FP8).

What stands for a weight's channels differs with what is around the layers. In float32, for CPUs,
DequantizeLinear has a scale for each channel. In float16, for TensorRT, it has one scale for all
weights that read an activation, and a Mul after the product has the channels' share of it.
TensorRT's compiler gives one scale to the product, in float32. Scales of channels it multiplies in
afterwards: the product is then stored as float16 before any scale, where sums of 8-bit products
overflow (docs/tensorrt.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


@dataclass(frozen=True)
class NumberFormat:
    """How a layer's numbers are stored.

    Attributes:
        name: ``int8`` or ``fp8``.
        largest: magnitude that a range's end becomes.
        kind: its type in ONNX.
        one_scale: one scale for all weights that read an activation, and a Mul for the channels;
            otherwise DequantizeLinear has the channels' scales.
        attention: whether the two products of attention are quantized too.
    """

    name: str
    largest: int
    kind: ir.DataType
    one_scale: bool
    attention: bool = False

    @property
    def zero(self) -> NDArray[Any]:
        """The zero point, a scalar."""
        return np.zeros((), self.kind.numpy())

    def encode(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Round values that are divided by their scale; what lies beyond the range is clipped."""
        whole = values if self.kind.is_floating_point() else np.round(values)
        return np.clip(whole, -self.largest, self.largest).astype(self.kind.numpy())


INT8 = NumberFormat("int8", 127, ir.DataType.INT8, one_scale=False)
"""With float32 around it."""

INT8_IN_HALF = NumberFormat("int8", 127, ir.DataType.INT8, one_scale=True)
"""With float16 around it."""

FP8 = NumberFormat("fp8", 448, ir.DataType.FLOAT8E4M3FN, one_scale=True, attention=True)
"""E4M3 without infinities, with float16 around it; from opset 19 on."""
