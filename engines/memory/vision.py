"""Count what a vision graph takes: weights, activations, and what its engine adds.

ONNX Runtime's formula is compared with what it holds by `benchmarks.memory_told`. TensorRT's
memory is told by the plan that was built; before that, and for the other engines, it is estimated.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.manifest import HALF_PRECISIONS
from engines.memory.parts import Basis, MemoryPart, Place
from engines.roofline import CLIP_L_336, TransformerShape

_ON_GPU = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-tensorrt")
_LEAN_LIBRARIES_BYTES = 200_000_000
"""Choice: what loads without cuDNN and without the builder, as TensorRT 10's runtime does."""


@dataclass(frozen=True)
class VisionPlan:
    """How a vision graph is going to be run.

    Attributes:
        engine: one of `engines.opening.ENGINES`.
        weight_bytes: of the graph's file, or of the plan.
        positions: patches and the class token.
        precision: of the graph.
        context_bytes: TensorRT's activations and scratch memory, where the plan tells it.
        batch: images in one run.
    """

    engine: str
    weight_bytes: int
    positions: int
    precision: str
    context_bytes: int | None = None
    batch: int = 1


def vision_parts(plan: VisionPlan, tower: TransformerShape = CLIP_L_336) -> list[MemoryPart]:
    """List what a vision graph takes.

    Args:
        plan: how it is run.
        tower: its shape, of which the activations are estimated.
    """
    place: Place = "gpu" if plan.engine in _ON_GPU else "host"
    parts = [MemoryPart("weights of the vision graph", plan.weight_bytes, place)]
    if plan.engine in ("tensorrt", "tensorrt-rtx") and plan.context_bytes is not None:
        parts.append(MemoryPart("TensorRT's context memory", plan.context_bytes, place, "plan"))
    else:
        basis: Basis = "counted" if plan.engine == "ort" else "estimate"
        size = _activation_bytes(plan, tower)
        parts.append(MemoryPart("activations of the vision graph", size, place, basis))
    if plan.engine in ("tensorrt", "tensorrt-rtx"):
        parts.append(MemoryPart("TensorRT's libraries", _LEAN_LIBRARIES_BYTES, basis="estimate"))
    return parts


def runs_on_gpu(engine: str) -> bool:
    """Return whether an engine of the vision graph is on a GPU."""
    return engine in _ON_GPU


def _activation_bytes(plan: VisionPlan, tower: TransformerShape) -> int:
    """Return the widest layer's activations, with its attention matrix where it is not fused."""
    width = 2 if plan.precision in HALF_PRECISIONS else 4
    rows = plan.positions * (4 * tower.hidden + 2 * tower.intermediate)
    scores = 2 * tower.heads * plan.positions**2 if width == 4 else 0
    return plan.batch * (rows + scores) * width
