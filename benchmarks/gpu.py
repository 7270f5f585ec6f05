"""CLIP-L/14-336 with VisionZip on a CUDA GPU, every way we know, in one table.

`python -m benchmarks.gpu` wherever a GPU is: the papers' released PyTorch path, transformers
without reduction, our graph in PyTorch and under torch.compile, ONNX Runtime on CUDA with and
without a CUDA graph, and TensorRT where it is installed. Every way starts with pixels in the host's
memory, float32[B, 3, 336, 336], and ends with projected visual tokens there. Random weights: speed
does not depend on them. A row that cannot run says why instead of a number, and its traceback goes
to stderr. It has not run yet on any GPU of ours.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks import papers_path, random_graphs
from benchmarks.board_table import BOARDS, BoardRow, fill_table
from engines import cli
from engines.device_facts import DeviceFacts, read_facts, read_memory
from engines.errors import EngineError, OptionError
from engines.gpu import Gpu, NoGpu, find_gpu
from engines.manifest import Precision
from engines.ort import CPU, CUDA, Provider
from engines.targets import Target, load_targets
from runtime.camera.budgets.power import PowerMeter, Tegrastats

PIXELS = "pixel_values"
DOMINANT, CONTEXTUAL = 54, 10
_WARM_UP = 5
_PAGE = Path("docs/jetson.md")
_PACKAGES = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime", "tensorrt", "polygraphy")
Step = Callable[[], NDArray[Any]]
"""One batch, finished when it returns: [B, N, D] in the host's memory."""


@dataclass(frozen=True)
class Timing:
    """One way of encoding a batch."""

    way: str
    median_ms: float | None
    p90_ms: float | None
    problem: str = ""
    power_w: float | None = None
    """Mean of the board while the batches ran; only a Jetson tells it."""
    memory_mb: float | None = None
    """By how much the free memory shrank while the way was loaded and run: the GPU's, or a Jetson's
    one memory."""


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


def measure(way: str, case: Case, prepare: Callable[[Case], Step]) -> Timing:
    """Warm up, look at what comes out, then time ``case.runs`` batches one by one."""
    print(f"{way} ...", file=sys.stderr)
    before = free_bytes(case)
    try:
        step = prepare(case)
        for _ in range(_WARM_UP):
            tokens = step()
        if tokens.ndim != 3 or len(tokens) != case.batch or not np.isfinite(tokens).all():
            raise EngineError(f"{tokens.dtype}{list(tokens.shape)} came out, or not-a-numbers.")
        spent = []
        if case.meter is not None:
            case.meter.take_watts()  # of the warm-up
        for _ in range(case.runs):
            start = time.perf_counter()
            step()
            spent.append((time.perf_counter() - start) * 1e3)
        power_w = None if case.meter is None else case.meter.take_watts()
        after = free_bytes(case)
        memory_mb = None if before is None or after is None else max(0, before - after) / 1e6
    except Exception as error:  # each library has its own, and the other rows are to be measured
        traceback.print_exc()
        said = " ".join(str(error).split())[:200].replace("|", "/")
        return Timing(way, None, None, f"{type(error).__name__}: {said}")
    median, p90 = float(np.median(spent)), float(np.percentile(spent, 90))
    return Timing(way, median, p90, power_w=power_w, memory_mb=memory_mb)


def free_bytes(case: Case) -> int | None:
    """Return what is free of the memory that the GPU takes; None where nothing tells it."""
    if case.gpu.integrated:
        return read_memory(Path("/proc/meminfo")).get("MemAvailable")
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


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


def run_all(case: Case, ways: dict[str, Callable[[Case], Step]]) -> Iterator[Timing]:
    """Time every way."""
    for way, prepare in ways.items():
        yield measure(way, case, prepare)
        if case.device == "cuda" and torch.cuda.is_available():
            torch.cuda.empty_cache()


def list_versions() -> dict[str, str]:
    """Return the version of everything that is measured and is installed."""
    found = {"python": platform.python_version(), "cuda of torch": str(torch.version.cuda)}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def row_of(timing: Timing) -> str:
    """Return a line of the table."""
    if timing.median_ms is None:
        return f"| {timing.way} | - | - | {timing.problem} |"
    took = [] if timing.power_w is None else [f"{timing.power_w:.1f} W"]
    took += [] if timing.memory_mb is None else [f"{timing.memory_mb:.0f} MB"]
    beside = f" {', '.join(took)}" if took else ""
    return f"| {timing.way} | {timing.median_ms:.2f} | {timing.p90_ms:.2f} |{beside} |"


def board_rows(timings: list[Timing], board: str, measured: str) -> list[BoardRow]:
    """Return timings as rows of docs/jetson.md."""
    return [
        BoardRow(
            board,
            timing.way,
            timing.median_ms,
            timing.p90_ms,
            timing.power_w,
            timing.memory_mb,
            f"{measured}; {timing.problem}" if timing.problem else measured,
        )
        for timing in timings
    ]


def board_here(gpu: Gpu, facts: DeviceFacts) -> tuple[str, str]:
    """Return the board's name in the table, and what it ran.

    Orin's boards share the name of the GPU, so the device tree's model tells them apart.
    """
    ran = [f"JetPack {facts.jetpack}"] if facts.jetpack else []
    ran += [f"power mode {facts.power_mode}"] if facts.power_mode else []
    model = facts.board or ""
    for board, words in BOARDS.items():
        if all(word in model for word in words):
            return board, ", ".join(ran)
    return model or gpu.name, ", ".join([*ran, f"driver {gpu.driver}"])


def main(
    *,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    runs: Annotated[int, typer.Option(min=3, help="Batches to time, one by one.")] = 100,
    only: Annotated[str, typer.Option(help="Only the ways with this in their name.")] = "",
    write: Annotated[
        bool,
        typer.Option("--write", help="Put this board's rows into the table of docs/jetson.md."),
    ] = False,
    page: Annotated[Path, typer.Option(help="Where the table is.")] = _PAGE,
    as_json: cli.JsonOption = False,
) -> None:
    """Time CLIP-L/14-336 with VisionZip on this machine's GPU, every way we know.

    Latency of a batch, the board's power while it ran (a Jetson's), and memory.
    """
    ways = choose_ways(only)
    gpu = find_gpu()
    if isinstance(gpu, NoGpu):
        raise EngineError(
            f"This benchmark measures a CUDA GPU: {gpu.reason}. For a CPU there is "
            "python -m benchmarks.x86."
        )
    measured_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    versions = list_versions()
    if write:
        fill_table(page, [])  # a page without a table is told before anything is measured
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        meter = opened.enter_context(Tegrastats()) if shutil.which("tegrastats") else None
        timings = list(run_all(Case(batch, runs, Path(folder), gpu, meter=meter), ways))
        if write:
            board, ran = board_here(gpu, read_facts())
            fill_table(page, board_rows(timings, board, f"{measured_at[:10]}, {ran}"))
        if as_json:
            document = {"measured_at": measured_at, "gpu": asdict(gpu), "versions": versions}
            rows = [asdict(timing) for timing in timings]
            cli.print_json(document | {"batch": batch, "runs": runs, "timings": rows})
            return
        print(f"{measured_at}, {gpu.name}, sm_{gpu.sm}, driver {gpu.driver}, batch {batch},")
        print(
            f"{runs} runs, CLIP-L/14-336, host to host; "
            + ", ".join(map(" ".join, versions.items()))
        )
        print("\n| way | median ms | p90 ms | |\n|---|---:|---:|---|")
        for timing in timings:
            print(row_of(timing), flush=True)


if __name__ == "__main__":
    cli.run(main, ["python -m benchmarks.gpu --write", "python -m benchmarks.gpu --batch 8 --json"])
