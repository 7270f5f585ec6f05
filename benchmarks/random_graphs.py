"""The graphs that the exporter really writes, small or at CLIP-L/14-336 size, with random weights.

`SIGLIP` is a small tower without a class token, whose scores are the mean attention of all queries.

Weights do not matter to a parser or a builder; the operators, shapes and types do, and these are
the exporter's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from calibration.scales.apply import apply_calibration
from calibration.scales.calibrate import CalibrationOptions, calibrate
from calibration.scales.calibration_file import Calibration
from calibration.scales.number_format import FP8, INT8, INT8_IN_HALF
from engines.manifest import TensorSpec
from export.reducers import REDUCERS, reducer_for_budget
from export.towers.registry import make_tower
from export.vision.to_onnx import export_onnx
from export.vision.vision_module import VisionModule
from graphs import graph_file
from graphs.float16 import convert_to_fp16, write_fp16_graph

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 7,
}
TINY, SIGLIP = CLIPVisionConfig(**_SMALL), SiglipVisionConfig(**_SMALL)
CLIP_L_336 = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
Config = CLIPVisionConfig | SiglipVisionConfig
NAMES = tuple(REDUCERS)
FP32_NAME = "vision.onnx"
"""Of the file that `write_graph` writes."""


def make_projector(config: Config) -> nn.Module:
    """Return two layers, as LLaVA-1.5 has them, to twice the width of the tower and back."""
    width = config.hidden_size
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def make_graph(reducer: str, config: Config, tells_worth: bool = False) -> VisionModule:
    """Return the graph of a reducer in PyTorch, FP32, random weights."""
    torch.manual_seed(0)
    model: nn.Module
    if isinstance(config, SiglipVisionConfig):
        model = SiglipVisionModel(config)
    else:
        model = CLIPVisionModel(config)
    image_size, patch_size = int(str(config.image_size)), int(str(config.patch_size))
    patches = (image_size // patch_size) ** 2
    tokens = None if reducer == "none" else 64 if patches > 64 else 16
    chosen = reducer_for_budget(reducer, tokens, patches)
    projector = make_projector(config)
    tower = make_tower(model, (config.num_hidden_layers - 1,), chosen.scoring)
    graph = VisionModule(tower, chosen, projector, image_size, patches, tells_worth)
    return graph.eval().requires_grad_(False)


def write_graph(
    folder: Path, reducer: str, config: Config = TINY, tells_worth: bool = False
) -> tuple[Path, tuple[TensorSpec, ...]]:
    """Export the graph of a reducer in FP32; return the file and its inputs."""
    exported = export_onnx(make_graph(reducer, config, tells_worth), folder / FP32_NAME)
    return exported.file, exported.inputs


def write_typed_graph(fp32: Path, precision: str) -> Path:
    """Give a graph the types of a precision, as a build does.

    INT8 has FP32 around it, as for CPUs; ``mixed`` and FP8 have FP16 around them, as for TensorRT.
    Parsers and builders do not judge scales, so two frames of noise are calibrated on.
    """
    if precision == "fp32":
        return fp32
    typed = fp32.with_name(f"{precision}.onnx")
    if precision == "fp16":
        return write_fp16_graph(fp32, typed).file
    model = ir.load(fp32)
    form = {"int8": INT8, "mixed": INT8_IN_HALF, "fp8": FP8}[precision]
    apply_calibration(model, calibrate_on_noise(fp32), form)
    if precision == "int8":
        return graph_file.write_graph(model, typed).file
    model.opset_imports[""] = 19  # the first whose Q/DQ take float16
    convert_to_fp16(model)
    return graph_file.write_graph(model, typed, opset=19).file


def calibrate_on_noise(fp32: Path) -> Calibration:
    """Return a calibration that costs little and means nothing."""
    pixels = ir.load(fp32).graph.inputs[0]
    shape = (2, 1, *(size for size in pixels.shape or () if isinstance(size, int)))
    frames = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    options = CalibrationOptions(method="max", alphas=(0.5,), sample_rows=16)
    return calibrate(fp32, list(frames), options)
