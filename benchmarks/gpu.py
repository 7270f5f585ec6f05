"""CLIP-L/14-336 with VisionZip on a CUDA GPU, every way we know, in one table.

`python -m benchmarks.gpu` wherever a GPU is: the papers' released PyTorch path, transformers
without reduction, our graph in PyTorch and under torch.compile, ONNX Runtime on CUDA with and
without a CUDA graph, and TensorRT where it is installed. Random weights: speed does not depend on
them. A row that cannot run says why instead of a number. It has not run yet on any GPU of ours.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import CLIPVisionModel

from benchmarks import papers_path, random_graphs
from engines import cli
from engines.errors import EngineError, FoveateError
from engines.gpu import Gpu, NoGpu, find_gpu
from engines.targets import Target, load_targets

PIXELS = "pixel_values"
Step = Callable[[], object]
"""One batch, finished when it returns."""


@dataclass(frozen=True)
class Timing:
    """One way of encoding a batch."""

    way: str
    median_ms: float | None
    p90_ms: float | None
    problem: str = ""


@dataclass(frozen=True)
class Case:
    """What every way is given."""

    batch: int
    runs: int
    folder: Path
    gpu: Gpu

    def pixels(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return float32[B, 3, 336, 336]."""
        shape = (self.batch, 3, 336, 336)
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def measure(way: str, case: Case, prepare: Callable[[Case], Step]) -> Timing:
    """Warm up, then time ``case.runs`` batches one by one."""
    print(f"{way} ...", file=sys.stderr)
    try:
        step = prepare(case)
        for _ in range(5):
            step()
        spent = []
        for _ in range(case.runs):
            start = time.perf_counter()
            step()
            spent.append((time.perf_counter() - start) * 1e3)
    except (FoveateError, ImportError, RuntimeError) as error:
        return Timing(way, None, None, " ".join(str(error).split())[:200])
    return Timing(way, float(np.median(spent)), float(np.percentile(spent, 90)))


def _model() -> CLIPVisionModel:
    torch.manual_seed(0)
    model: CLIPVisionModel = CLIPVisionModel(random_graphs.CLIP_L_336).eval().half().cuda()
    return model


def _finished(work: Callable[[], object]) -> Step:
    def step() -> object:
        with torch.inference_mode():
            result = work()
        torch.cuda.synchronize()
        return result

    return step


def papers_pytorch(case: Case) -> Step:
    """Prepare the released code's way: eager attention, every matrix kept, indexing afterwards."""
    model, pixels = _model(), torch.from_numpy(case.pixels()).half().cuda()
    return _finished(
        lambda: papers_path.visionzip(
            papers_path.run_tower(model, pixels), dominant=54, contextual=10
        )
    )


def transformers_unreduced(case: Case) -> Step:
    """Prepare transformers' fused attention, all 576 tokens."""
    model, pixels = _model(), torch.from_numpy(case.pixels()).half().cuda()
    return _finished(lambda: model(pixels, output_hidden_states=True).hidden_states[-2])


def _our_graph() -> torch.nn.Module:
    return random_graphs.make_graph("visionzip", random_graphs.CLIP_L_336).half().cuda()


def ours_pytorch(case: Case) -> Step:
    """Prepare our graph in PyTorch."""
    graph, pixels = _our_graph(), torch.from_numpy(case.pixels()).half().cuda()
    return _finished(lambda: graph(pixels))


def ours_compiled(case: Case) -> Step:
    """Prepare our graph under torch.compile, with CUDA graphs."""
    graph = torch.compile(_our_graph(), mode="reduce-overhead")
    pixels = torch.from_numpy(case.pixels()).half().cuda()
    return _finished(lambda: graph(pixels))


def onnxruntime_cuda(precision: str, *, cuda_graph: bool) -> Callable[[Case], Step]:
    """Return what prepares ONNX Runtime on CUDA, input and outputs bound to device memory."""

    def prepare(case: Case) -> Step:
        from engines.ort import CUDA, create_inference_session

        file = _onnx_file(case, precision)
        options = {"use_tf32": "0", "enable_cuda_graph": "1" if cuda_graph else "0"}
        session = create_inference_session(file, providers=[(CUDA, options)])
        import onnxruntime

        binding = session.io_binding()
        pixels = onnxruntime.OrtValue.ortvalue_from_numpy(case.pixels(), "cuda", 0)
        binding.bind_ortvalue_input(PIXELS, pixels)
        for output in session.get_outputs():
            binding.bind_output(output.name, "cuda")

        def step() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return step

    return prepare


def tensorrt(precision: str) -> Callable[[Case], Step]:
    """Return what prepares our own TensorRT session, host to host."""

    def prepare(case: Case) -> Step:
        from engines.manifest import TensorSpec
        from engines.trt.builder import BuildOptions, build_plan
        from engines.trt.cuda_memory import open_cuda_runtime
        from engines.trt.library import load_library_for
        from engines.trt.session import TrtSession

        target = _target_for(case.gpu)
        file = _onnx_file(case, precision)
        options = BuildOptions(
            onnx=file,
            onnx_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
            plan=file.with_suffix(f".{precision}.plan"),
            target=target,
            precision="fp16" if precision == "fp16" else "fp32",
            inputs=(TensorSpec(name=PIXELS, dtype="float32", shape=("batch", 3, 336, 336)),),
        )
        plan = build_plan(options).plan
        session = TrtSession(plan.read_bytes(), load_library_for(target), open_cuda_runtime())
        inputs = {PIXELS: case.pixels()}
        return lambda: session.run(inputs)

    return prepare


def _target_for(gpu: Gpu) -> Target:
    for target in load_targets().values():
        if target.engine == "tensorrt" and target.sm == gpu.sm:
            return target
    raise EngineError(f"No target for sm_{gpu.sm}; describe one with --targets.")


def _onnx_file(case: Case, precision: str) -> Path:
    """Export once, then reuse."""
    fp32 = case.folder / "vision.onnx"
    if not fp32.exists():
        random_graphs.write_graph(case.folder, "visionzip", random_graphs.CLIP_L_336)
    typed = case.folder / f"{precision}.onnx"
    if precision == "fp32" or typed.exists():
        return fp32 if precision == "fp32" else typed
    return random_graphs.write_typed_graph(fp32, precision)


WAYS: dict[str, Callable[[Case], Step]] = {
    "papers' PyTorch path, FP16": papers_pytorch,
    "transformers, no reduction, FP16": transformers_unreduced,
    "our graph, PyTorch, FP16": ours_pytorch,
    "our graph, torch.compile, FP16": ours_compiled,
    "ONNX Runtime CUDA, FP32": onnxruntime_cuda("fp32", cuda_graph=False),
    "ONNX Runtime CUDA, FP16": onnxruntime_cuda("fp16", cuda_graph=False),
    "ONNX Runtime CUDA, FP16, CUDA graph": onnxruntime_cuda("fp16", cuda_graph=True),
    "TensorRT, FP32": tensorrt("fp32"),
    "TensorRT, FP16": tensorrt("fp16"),
}


def run_all(batch: int, runs: int, gpu: Gpu) -> Iterator[Timing]:
    """Time every way."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(batch, runs, Path(folder), gpu)
        for way, prepare in WAYS.items():
            yield measure(way, case, prepare)
            torch.cuda.empty_cache()


def main(
    *,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    runs: Annotated[int, typer.Option(min=3)] = 100,
    as_json: cli.JsonOption = False,
) -> None:
    """Time CLIP-L/14-336 with VisionZip on this machine's GPU, every way we know."""
    gpu = find_gpu()
    if isinstance(gpu, NoGpu):
        raise EngineError(f"This benchmark measures a CUDA GPU: {gpu.reason}.")
    timings = list(run_all(batch, runs, gpu))
    if as_json:
        cli.print_json(
            {"gpu": asdict(gpu), "batch": batch, "timings": [asdict(item) for item in timings]}
        )
        return
    print(f"{gpu.name}, driver {gpu.driver}, batch {batch}, {runs} runs, CLIP-L/14-336\n")
    print("| way | median ms | p90 ms |\n|---|---:|---:|")
    for item in timings:
        cells = (
            (item.problem, "")
            if item.median_ms is None
            else (
                f"{item.median_ms:.2f}",
                f"{item.p90_ms:.2f}",
            )
        )
        print(f"| {item.way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    cli.run(main, ["python -m benchmarks.gpu", "python -m benchmarks.gpu --batch 8 --json"])
