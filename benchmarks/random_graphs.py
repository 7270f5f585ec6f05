"""The graphs that the exporter really writes, small or at CLIP-L/14-336 size, with random weights.

Weights do not matter to a parser or a builder; the operators, shapes and types do, and these are
the exporter's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from calibration.half_precision import write_fp16_graph
from engines.manifest import TensorSpec
from export.reducers import REDUCERS, reducer_for_budget
from export.to_onnx import export_onnx
from export.towers.registry import make_tower
from export.visual_graph import VisualGraph

TINY = CLIPVisionConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=56,
    patch_size=7,
)
CLIP_L_336 = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
NAMES = tuple(REDUCERS)


def make_graph(reducer: str, config: CLIPVisionConfig) -> VisualGraph:
    """Return the graph of a reducer in PyTorch, FP32, random weights."""
    torch.manual_seed(0)
    model = CLIPVisionModel(config).eval()
    patches = (config.image_size // config.patch_size) ** 2
    tokens = None if reducer == "none" else 64 if patches > 64 else 16
    chosen = reducer_for_budget(reducer, tokens, patches)
    width = config.hidden_size
    projector = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    tower = make_tower(model, config.num_hidden_layers - 1, chosen.scoring)
    graph = VisualGraph(tower, chosen, projector, config.image_size, patches)
    return graph.eval().requires_grad_(False)


def write_graph(
    folder: Path, reducer: str, config: CLIPVisionConfig = TINY
) -> tuple[Path, tuple[TensorSpec, ...]]:
    """Export the graph of a reducer in FP32; return the file and its inputs."""
    exported = export_onnx(make_graph(reducer, config), folder / "vision.onnx")
    return exported.file, exported.inputs


def write_typed_graph(fp32: Path, precision: str) -> Path:
    """Give a graph the types of a precision: FP16 by our converter, INT8 by ONNX Runtime's own.

    The INT8 graph is for parsers and builders only: its scales come from two frames of noise.
    """
    if precision == "fp32":
        return fp32
    typed = fp32.with_name(f"{precision}.onnx")
    if precision == "fp16":
        return write_fp16_graph(fp32, typed).file
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    model = onnx.load(fp32)
    kept = [node.name for node in model.graph.node if _stays_fp32(node.name)]
    height = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value

    class Noise(CalibrationDataReader):
        def __init__(self) -> None:
            random = np.random.default_rng(0)
            frames = random.standard_normal((2, 1, 3, height, height)).astype(np.float32)
            self.frames = iter([{"pixel_values": frame} for frame in frames])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.frames, None)

    quantize_static(
        fp32,
        typed,
        Noise(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        nodes_to_exclude=[*kept, *_attention_matmuls(model)],
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    return typed


def _stays_fp32(name: str) -> bool:
    return name.startswith(("reducer", "Shape")) or "scores" in name.split("/", maxsplit=1)[0]


def _attention_matmuls(model: onnx.ModelProto) -> list[str]:
    """MatMuls of two activations: attention itself, which stays in floating point."""
    weights = {item.name for item in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and not weights & set(node.input)
    ]
