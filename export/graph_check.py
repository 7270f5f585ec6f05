"""What TensorRT would refuse in a graph, told before the graph reaches a robot."""

from __future__ import annotations

TENSORRT_OPS = frozenset(
    {
        *("MatMul", "Gemm", "Conv", "LayerNormalization", "Softmax", "TopK", "ArgMax", "Gather"),
        *("GatherElements", "Where", "Equal", "Cast", "Concat", "Slice", "Reshape", "Transpose"),
        *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"),
        # Elementwise arithmetic and logic.
        *("Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Pow", "Floor", "Clip", "Erf", "Sigmoid"),
        *("Tanh", "Max", "Min", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        *("And", "Or", "Not"),
        # The plumbing of a dynamic batch.
        *("Shape", "Expand", "Unsqueeze", "Squeeze", "Identity", "Constant"),
        # INT8.
        *("QuantizeLinear", "DequantizeLinear"),
    }
)
"""Operators that TensorRT 10.3 to 11 parse, and the only ones a graph may be made of."""
