"""The ways of turning pixels into visual tokens on a GPU that `benchmarks.gpu` times.

Each takes a `Case` and prepares what runs one batch: CLIP-L/14-336 with VisionZip, from pixels in
the host's memory to projected tokens there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks import papers_path, random_graphs
from engines.errors import EngineError, OptionError
from engines.gpu import Gpu
from engines.manifest import Precision
from engines.ort import CPU, CUDA, Provider
from engines.targets import Target, load_targets
from runtime.camera.budgets.power import PowerMeter

PIXELS = "pixel_values"
DOMINANT, CONTEXTUAL = 54, 10
Step = Callable[[], NDArray[Any]]
"""One batch, finished when it returns: [B, N, D] in the host's memory."""


@dataclass(frozen=True)
class Case:
    """What every way is given."""

    batch: int
    runs: int
    folder: Path
    gpu: Gpu
    config: CLIPVisionConfig = field(default_factory=lambda: random_graphs.CLIP_L_336)
    device: str = "cuda"
    """Another one where the benchmark itself is tested."""
    meter: PowerMeter | None = None
    """What tells the power; None where nothing does."""

    @property
    def side(self) -> int:
        """Pixels along one side."""
        return int(str(self.config.image_size))

    def pixels(self) -> NDArray[np.float32]:
        """Return float32[B, 3, H, W]."""
        shape = (self.batch, 3, self.side, self.side)
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _in_torch(case: Case, encode: Callable[[torch.Tensor], torch.Tensor]) -> Step:
    """Return a step: pixels to the GPU as FP16, encoded, tokens back, which waits for them."""
    pixels = torch.from_numpy(case.pixels())

    def step() -> NDArray[Any]:
        with torch.inference_mode():
            tokens: NDArray[Any] = encode(pixels.to(case.device).half()).cpu().numpy()
        return tokens

    return step


def _tower_and_projector(case: Case) -> tuple[CLIPVisionModel, nn.Module]:
    torch.manual_seed(0)
    model = CLIPVisionModel(case.config).eval().half().to(case.device)
    return model, random_graphs.make_projector(case.config).half().to(case.device)


def papers_pytorch(case: Case) -> Step:
    """Prepare the released code's way: eager attention, every matrix kept, indexing afterwards."""
    model, projector = _tower_and_projector(case)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        run = papers_path.run_tower(model, pixels)
        tokens, _ = papers_path.visionzip(run, dominant=DOMINANT, contextual=CONTEXTUAL)
        projected: torch.Tensor = projector(tokens)
        return projected

    return _in_torch(case, encode)


def transformers_unreduced(case: Case) -> Step:
    """Prepare transformers' fused attention, all patches."""
    model, projector = _tower_and_projector(case)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        states = model(pixels, output_hidden_states=True).hidden_states
        projected: torch.Tensor = projector(states[-2][:, 1:])
        return projected

    return _in_torch(case, encode)


def ours_pytorch(case: Case) -> Step:
    """Prepare our graph in PyTorch."""
    graph = random_graphs.make_graph("visionzip", case.config).half().to(case.device)
    return _in_torch(case, lambda pixels: graph(pixels)[0])


def ours_compiled(case: Case) -> Step:
    """Prepare our graph under torch.compile, with CUDA graphs."""
    graph = random_graphs.make_graph("visionzip", case.config).half().to(case.device)
    compiled = torch.compile(graph, mode="reduce-overhead")
    return _in_torch(case, lambda pixels: compiled(pixels)[0])


def onnxruntime_cuda(precision: Precision, *, cuda_graph: bool = False) -> Callable[[Case], Step]:
    """Return what prepares ONNX Runtime, with buffers on the GPU that stay where they are.

    A CUDA graph replays on the addresses it was captured with, and takes a graph of which nothing
    runs on the CPU: with the batch known, no shape is left to compute there.
    """

    def prepare(case: Case) -> Step:
        from onnxruntime import OrtValue

        from engines.ort import create_inference_session

        session = create_inference_session(
            _onnx_file(case, precision),
            providers=_providers(case, cuda_graph=cuda_graph),
            axes={"batch": case.batch},
        )
        pixels = case.pixels()
        given = OrtValue.ortvalue_from_numpy(pixels, case.device, 0)
        binding = session.io_binding()
        binding.bind_ortvalue_input(PIXELS, given)
        for node in session.get_outputs():
            kind = np.int64 if node.type == "tensor(int64)" else np.float32
            shape = [case.batch if isinstance(axis, str) else axis for axis in node.shape]
            value = OrtValue.ortvalue_from_shape_and_type(shape, kind, case.device, 0)
            binding.bind_ortvalue_output(node.name, value)

        def step() -> NDArray[Any]:
            given.update_inplace(pixels)
            binding.synchronize_inputs()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            tokens: NDArray[Any] = binding.copy_outputs_to_cpu()[0]
            return tokens

        return step

    return prepare


def _providers(case: Case, *, cuda_graph: bool) -> list[Provider]:
    if case.device != "cuda":
        return [CPU]
    return [(CUDA, {"use_tf32": "0", "enable_cuda_graph": "1" if cuda_graph else "0"})]


def tensorrt(precision: Precision) -> Callable[[Case], Step]:
    """Return what prepares our own TensorRT session."""

    def prepare(case: Case) -> Step:
        from engines.manifest import TensorSpec
        from engines.trt.batch_profile import BatchRange
        from engines.trt.builder import PlanTask, build_plan
        from engines.trt.cuda_memory import open_cuda_runtime
        from engines.trt.library import load_library_for
        from engines.trt.session import TrtSession

        target = target_of_gpu(case.gpu)
        file = _onnx_file(case, precision)
        shape = ("batch", 3, case.side, case.side)
        options = PlanTask(
            onnx=file,
            onnx_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
            plan=file.with_suffix(".plan"),
            target=target,
            precision=precision,
            inputs=(TensorSpec(name=PIXELS, dtype="float32", shape=shape),),
            batch=BatchRange(case.batch, case.batch, case.batch),
        )
        plan = build_plan(options).plan
        session = TrtSession(plan.read_bytes(), load_library_for(target), open_cuda_runtime())
        inputs = {PIXELS: case.pixels()}
        return lambda: session.run(inputs)["visual_tokens"]

    return prepare


def target_of_gpu(gpu: Gpu) -> Target:
    """Return a target that TensorRT serves on this GPU; one of the same kind is as good.

    Raises:
        EngineError: there is none.
    """
    for target in load_targets().values():
        if target.engine == "tensorrt" and target.sm == gpu.sm:
            return target
    raise EngineError(f"no TensorRT target has sm_{gpu.sm}; add one to engines/targets.toml")


def _onnx_file(case: Case, precision: Precision) -> Path:
    """Export once, then reuse."""
    fp32 = case.folder / "vision.onnx"
    if not fp32.exists():
        random_graphs.write_graph(case.folder, "visionzip", case.config)
    typed = fp32 if precision == "fp32" else case.folder / f"{precision}.onnx"
    return typed if typed.exists() else random_graphs.write_typed_graph(fp32, precision)


WAYS: dict[str, Callable[[Case], Step]] = {
    "papers' PyTorch path, FP16": papers_pytorch,
    "transformers, no reduction, FP16": transformers_unreduced,
    "our graph, PyTorch, FP16": ours_pytorch,
    "our graph, torch.compile, FP16": ours_compiled,
    "ONNX Runtime CUDA, FP32": onnxruntime_cuda("fp32"),
    "ONNX Runtime CUDA, FP16": onnxruntime_cuda("fp16"),
    "ONNX Runtime CUDA, FP16, CUDA graph": onnxruntime_cuda("fp16", cuda_graph=True),
    "TensorRT, FP32": tensorrt("fp32"),
    "TensorRT, FP16": tensorrt("fp16"),
    "TensorRT, INT8 and FP16 (mixed)": tensorrt("mixed"),
}


def choose_ways(only: str) -> dict[str, Callable[[Case], Step]]:
    """Return the ways whose name holds ``only``.

    Raises:
        OptionError: there is none.
    """
    chosen = {way: prepare for way, prepare in WAYS.items() if only.lower() in way.lower()}
    if not chosen:
        raise OptionError(f'--only "{only}": no way has that in its name: {"; ".join(WAYS)}.')
    return chosen
