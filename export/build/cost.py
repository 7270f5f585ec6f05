"""Predict the memory, disk and time of a build from the checkpoint's headers alone.

A build that this machine has no room for is refused, and what would fit is named. The rates were
measured on a LLaVA-1.5-7B (docs/real-size.md).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.errors import OptionError
from engines.free_memory import read_free_memory
from engines.manifest import QUANTIZED_PRECISIONS, Precision
from export.checkpoint.weights import LlavaWeights, Part
from export.language.language_models import DecoderBackend, DecoderOptions

_GB = 1e9
_PROCESS_BYTES = 1.2e9
"""PyTorch, transformers and ONNX Runtime, loaded."""
_TOWER_COPIES = 3.5
"""Of the tower in float32, while it is traced and written."""
_CALIBRATION_COPIES = 2
"""Of it, while it is calibrated, most of them of files that are mapped."""
_CALIBRATION_FILES = 3.6
"""Of it on the disk meanwhile: the float32 graph, one kept for another try, one with its weights
apart, and the statistics."""
_FRAME_CORE_SECONDS_PER_GIGAWEIGHT = 17
"""Of 577 tokens."""
_JUDGED_FRAMES = 1.2
"""A frame in both precisions, in frames."""
_SMOOTHING_CORE_SECONDS_PER_GIGAWEIGHT = 165
_QUANTIZING_CORE_SECONDS_PER_GIGAWEIGHT = 50
"""For each graph."""
_FRAMES_OF_RANKING, _TRIALS = 160, 20
"""Of a search for layers to leave in floating point: frames to rank on, and trials after that."""
_LARGEST_IN_WORK = 1.5
"""Matrices of the decoder in work at once, in sizes of the largest, which is the head."""
_BYTES_IN_WORK = 2 + 4 + 4 + 1
"""Of a weight that is being quantized: as stored, in float32, transposed, and the result."""
_BYTES_PER_WEIGHT: Mapping[str, float] = {
    "int4": 0.5 + 4 / 32,
    "int8": 1 + 4 / 32,
    "fp32": 4,
    "q4_k_m": 0.606,
    "q8_0": 1.0625,
    "f16": 2,
    "f32": 4,
}
_CORE_SECONDS_PER_GIGAWEIGHT: Mapping[str, float] = {
    "int4": 15,
    "int8": 15,
    "fp32": 15,
    "q4_k_m": 130,
    "q8_0": 30,
    "f16": 10,
    "f32": 15,
}
_GRAPH_CORE_SECONDS_PER_GIGAWEIGHT = 60
_GRAPH_S, _DECODER_S = 5, 8
"""What the smallest takes."""
_HASHING_S_PER_GB = 5
_STARTING_S = 10
_ONNX = ("ort", "openvino")
"""Backends that share one file."""
_ONNX_STEPS = tuple(f"decoder_{backend}" for backend in _ONNX)
_MOST_CORES = 4


@dataclass(frozen=True)
class StepCost:
    """One step of a build.

    Attributes:
        name: as `BuildReport.seconds` calls it.
        memory_bytes: most that is resident at once.
        temporary_bytes: on disk, gone when the step is done.
        written_bytes: of the bundle.
        seconds: about, on this machine's cores when nothing else runs.
    """

    name: str
    memory_bytes: int
    temporary_bytes: int
    written_bytes: int
    seconds: float


@dataclass(frozen=True)
class BuildCost:
    """A whole build."""

    steps: tuple[StepCost, ...]

    @property
    def memory_bytes(self) -> int:
        """Most that is resident at once."""
        return max(step.memory_bytes for step in self.steps)

    @property
    def bundle_bytes(self) -> int:
        """The bundle's size."""
        return sum(step.written_bytes for step in self.steps)

    @property
    def disk_bytes(self) -> int:
        """Most that lies on the disk at once, what was written before included."""
        written, most = 0, 0
        for step in self.steps:
            written += step.written_bytes
            most = max(most, written + step.temporary_bytes)
        return most

    @property
    def seconds(self) -> float:
        """About how long, on this machine's cores when nothing else runs."""
        return sum(step.seconds for step in self.steps)

    def describe(self) -> str:
        """Return one line for whoever waits."""
        return (
            f"about {self.memory_bytes / _GB:.1f} GB of memory, {self.disk_bytes / _GB:.1f} GB of "
            f"disk ({self.bundle_bytes / _GB:.1f} GB stay) and {told_duration(self.seconds)}"
        )


def told_duration(seconds: float) -> str:
    """Return seconds as a person says them."""
    return f"{math.ceil(seconds / 60)} minutes" if seconds > 90 else f"{math.ceil(seconds)} s"


def predict_cost(
    weights: LlavaWeights,
    precision: Precision,
    graphs: int,
    decoders: DecoderOptions,
    frames: int = 0,
) -> BuildCost:
    """Predict a build from the sizes of the checkpoint's tensors; reads headers only.

    Args:
        weights: of the checkpoint.
        precision: of the vision graphs.
        graphs: how many of them; the weights are written once.
        decoders: which of them.
        frames: to calibrate with, at most; squares, where they are cut into tiles.
    """
    seen = sum(map(math.prod, weights.shapes(Part.VISION_TOWER).values()))
    seen += sum(map(math.prod, weights.shapes(Part.PROJECTOR).values()))
    language = {n: math.prod(s) for n, s in weights.shapes(Part.LANGUAGE_MODEL).items()}
    tables = sum(count for name, count in language.items() if "embed_tokens" in name)
    steps = [_vision_cost(seen, precision, graphs)]
    if precision in QUANTIZED_PRECISIONS:
        steps.append(_calibration_cost(seen, precision, graphs, frames))
    for backend in decoders.backends:
        if backend in _ONNX and any(step.name in _ONNX_STEPS for step in steps):
            steps.append(StepCost(f"decoder_{backend}", int(_PROCESS_BYTES), 0, 0, 0))
            continue
        precision_of = decoders.precision_of(backend)
        steps.append(_decoder_cost(backend, precision_of, language, tables))
    steps.append(StepCost("text", int(_PROCESS_BYTES + 6 * tables), 0, 2 * tables, tables / 1e8))
    stays = sum(step.written_bytes for step in steps)
    hashing = _STARTING_S + stays / _GB * _HASHING_S_PER_GB
    steps.append(StepCost("publishing", int(_PROCESS_BYTES), 0, 0, hashing))
    return BuildCost(tuple(steps))


def _vision_cost(weights: int, precision: Precision, graphs: int) -> StepCost:
    exact = 4 * weights
    quantized = precision in QUANTIZED_PRECISIONS
    return StepCost(
        "vision",
        int(_PROCESS_BYTES + exact * _TOWER_COPIES),
        2 * exact if quantized else 0,
        {"fp32": 4, "fp16": 2}.get(precision, 0) * weights,
        graphs * _GRAPH_S + weights / _GB * _GRAPH_CORE_SECONDS_PER_GIGAWEIGHT,
    )


def _calibration_cost(weights: int, precision: Precision, graphs: int, frames: int) -> StepCost:
    """Of eight frames five are run once; two are judged, in both precisions, for each graph."""
    runs = frames * (5 / 8 + graphs * 2 / 8 * _JUDGED_FRAMES)
    if precision == "mixed" and frames:
        runs += graphs * (_FRAMES_OF_RANKING + _TRIALS * frames / 8)
    core_seconds = (
        runs * _FRAME_CORE_SECONDS_PER_GIGAWEIGHT
        + (_SMOOTHING_CORE_SECONDS_PER_GIGAWEIGHT if frames else 0)
        + graphs * _QUANTIZING_CORE_SECONDS_PER_GIGAWEIGHT
    )
    cores = min(os.cpu_count() or 1, _MOST_CORES)
    return StepCost(
        "int8",
        int(_PROCESS_BYTES + 4 * weights * _CALIBRATION_COPIES),
        int(4 * weights * _CALIBRATION_FILES),
        int(1.3 * weights),
        _GRAPH_S + weights / _GB * core_seconds / cores,
    )


def _decoder_cost(
    backend: DecoderBackend, precision: str, language: Mapping[str, int], tables: int
) -> StepCost:
    count = sum(language.values())
    written = count - tables if backend in _ONNX else count
    largest = max(language.values())
    quantized = precision not in ("f16", "f32", "fp32")
    cores = min(os.cpu_count() or 1, _MOST_CORES)
    return StepCost(
        f"decoder_{backend}",
        int(2 * _PROCESS_BYTES + largest * _BYTES_IN_WORK * _LARGEST_IN_WORK),
        2 * count if backend == "llamacpp" and quantized else 0,
        int(written * _BYTES_PER_WEIGHT[precision]),
        _DECODER_S + written / _GB * _CORE_SECONDS_PER_GIGAWEIGHT[precision] / cores,
    )


def refuse_what_cannot_fit(
    cost: BuildCost, out: Path, decoders: DecoderOptions, room: int | None = None
) -> None:
    """Refuse a build for which this machine has too little memory or disk.

    Args:
        cost: from `predict_cost`.
        out: where the bundle will be.
        decoders: what the cost was predicted for.
        room: bytes of memory that are available; None asks the system.

    Raises:
        OptionError: it cannot fit; what would is named.
    """
    room = read_free_memory() if room is None else room
    problems = []
    if room is not None and cost.memory_bytes > room:
        step = max(cost.steps, key=lambda step: step.memory_bytes)
        problems.append(
            f"the step {step.name!r} needs about {cost.memory_bytes / _GB:.1f} GB of memory and "
            f"{room / _GB:.1f} GB are available. Stop other programs, add swap, or "
            f"{_smaller(step.name, decoders)}"
        )
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if cost.disk_bytes > free:
        problems.append(
            f"it needs about {cost.disk_bytes / _GB:.1f} GB on the disk of {parent} and "
            f"{free / _GB:.1f} GB are free. Free some, give --out on another disk, or "
            f"{_smaller('disk', decoders)}"
        )
    if problems:
        raise OptionError(f"This build would not fit: {'; '.join(problems)}.")


def _smaller(step: str, decoders: DecoderOptions) -> str:
    if step in ("vision", "int8"):
        return "build it on a larger machine: the bundle can be copied"
    wide = {"fp32", "f32", "f16"} & {str(decoders.precision_of(b)) for b in decoders.backends}
    if wide:
        return "quantize the decoder: --llm-precision int4"
    if "llamacpp" in decoders.backends:
        return "build without the GGUF's float16 copy: --llm-backend ort"
    return "build for llama.cpp: --llm-backend llamacpp"
