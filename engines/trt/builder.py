"""Build a TensorRT plan from an ONNX graph, and write its signed sidecar and layer report.

TensorRT and TensorRT-RTX both go through Polygraphy's loaders. TensorRT builds on the GPU that the
plan is for. TensorRT-RTX builds ahead of time for a compute capability and needs no GPU. The
network is strongly typed: precision is the graph's own and no precision flag is set. TF32 is
cleared, because a score rounded to ten bits keeps another patch.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from engines.errors import EngineError
from engines.gpu import Gpu, NoGpu, find_gpu, read_power_mode
from engines.manifest import Precision, TensorSpec
from engines.staging import staged_file
from engines.targets import Target, targets_of_gpu
from engines.trt.batch_profile import ONE_IMAGE, BatchRange, shape_ranges
from engines.trt.build_log import BuildLog
from engines.trt.build_progress import ProgressCallback, make_progress_monitor
from engines.trt.layer_report import (
    EngineReport,
    LayerReport,
    report_engine,
    report_layers,
    report_network,
)
from engines.trt.library import TrtLibrary, load_library_for, load_polygraphy
from engines.trt.logger import process_logger
from engines.trt.plan import PlanRecord, ShapeRange, write_plan
from engines.version import __version__

_FLAGS = ("STRONGLY_TYPED", "NO_TF32")
_MIB = 1 << 20


@dataclass(frozen=True)
class PlanTask:
    """One plan to build.

    Attributes:
        onnx: the graph.
        onnx_sha256: its digest, already verified.
        plan: where the plan is to be.
        target: the device it is for.
        precision: what the graph was exported in; it is recorded, not set.
        inputs: the graph's inputs; a named axis is the batch or the number of visual tokens.
        batch: the optimisation profile.
        tokens: the same of visual tokens, where their number is not fixed.
        workspace_bytes: scratch memory of the builder; None for the target's.
        optimization_level: 0 to 5, how long to look for fast kernels; None is TensorRT's default.
    """

    onnx: Path
    onnx_sha256: str
    plan: Path
    target: Target
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    batch: BatchRange = ONE_IMAGE
    tokens: BatchRange = ONE_IMAGE
    workspace_bytes: int | None = None
    optimization_level: int | None = None

    @property
    def profile(self) -> dict[str, ShapeRange]:
        """The shapes that the plan is to take.

        Raises:
            OptionError: the graph's batch is fixed and another one was asked for.
        """
        return shape_ranges(self.inputs, self.batch, self.tokens)


@dataclass(frozen=True)
class BuildResult:
    """What was built."""

    plan: Path
    record: PlanRecord
    layers: LayerReport


def workspace_of(options: PlanTask) -> int:
    """Return the scratch memory to plan with, in bytes."""
    return options.workspace_bytes or (options.target.workspace_mb or 1024) * _MIB


def timing_cache_path(folder: Path, library: TrtLibrary, gpu: Gpu | None) -> Path | None:
    """Return the timing cache of exactly this library on exactly this GPU.

    None ahead of time: TensorRT-RTX measures nothing while it builds.
    """
    if gpu is None:
        return None
    device = "".join(c if c.isalnum() else "-" for c in gpu.name)
    return folder / f"timing-{library.name}-{library.version}-sm{gpu.sm}-{device}.cache"


def choose_gpu(target: Target, found: Gpu | NoGpu) -> Gpu | None:
    """Return the GPU to build on, None to build ahead of time.

    Raises:
        EngineError: TensorRT needs the target's own GPU and it is not here.
    """
    if target.engine == "tensorrt-rtx":
        return None
    there = "python -m engines.build BUNDLE (or ./build_on_device.sh in the bundle)"
    if isinstance(found, NoGpu):
        raise EngineError(
            f"A TensorRT plan for {target.name} is built on the device itself, and here is no "
            f"GPU: {found.reason}. Copy the bundle to the {target.title} and run there: {there}"
        )
    if found.sm != target.sm:
        raise EngineError(
            f"A TensorRT plan is for one compute capability: {target.name} has sm_{target.sm}, "
            f"this machine's {found.name} has sm_{found.sm}. Copy the bundle to the "
            f"{target.title} and run there: {there}, or build for this GPU: "
            f"{targets_of_gpu(found.sm, target.engine)}."
        )
    return found


def build_plan(options: PlanTask, on_progress: ProgressCallback | None = None) -> BuildResult:
    """Build a plan.

    Args:
        options: what to build.
        on_progress: called with the phase and how much of it is done, 0 to 1.

    Raises:
        EngineError: no library, no or another GPU, a graph the parser refuses, a failed build.
        OptionError: a batch the graph cannot take.
        KeyboardInterrupt: interrupted; the builder stopped and nothing was written.
    """
    profile = options.profile
    gpu = choose_gpu(options.target, find_gpu())
    library = load_library_for(options.target)
    options.plan.parent.mkdir(parents=True, exist_ok=True)
    loaders = load_polygraphy(library)
    with BuildLog() as log, _every_message():
        work = _Compilation(loaders, library, options, profile, gpu, log.errors)
        parsed, parse_seconds = _timed(work.parse)
        network_report = report_network(parsed[1])
        data, build_seconds = _timed(lambda: work.build(parsed, on_progress))
    engine = _open(library, data) if gpu else None
    record = write_plan(
        options.plan,
        memoryview(data),
        PlanRecord(
            onnx_file=options.onnx.name,
            onnx_sha256=options.onnx_sha256,
            library=library.name,
            library_version=library.version,
            target=options.target.name,
            precision=options.precision,
            sm=options.target.sm or 0,
            gpu=gpu.name if gpu else None,
            multiprocessors=gpu.multiprocessors if gpu else None,
            power_mode=read_power_mode() if gpu else None,
            driver=gpu.driver if gpu else None,
            profile=profile,
            flags=_FLAGS,
            workspace_bytes=workspace_of(options),
            optimization_level=options.optimization_level,
            context_bytes=None if engine is None else int(engine.device_memory_size_v2),
            build_seconds=round(build_seconds, 3),
            built_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            foveate=__version__,
        ),
    )
    layers = LayerReport(
        parse_seconds=round(parse_seconds, 3),
        network=network_report,
        engine=report_layers(log.layers) if engine is None else _inspect(library.trt, engine),
    )
    with staged_file(layers_path(options.plan), EngineError) as staged:
        staged.write_text(layers.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return BuildResult(options.plan, record, layers)


def layers_path(plan: Path) -> Path:
    """Return where the layer report of a plan lies."""
    return plan.with_name(f"{plan.name}.layers.json")


@dataclass(frozen=True)
class _Compilation:
    """One parse and one build, with everything both need."""

    loaders: Any
    library: TrtLibrary
    options: PlanTask
    profile: dict[str, ShapeRange]
    gpu: Gpu | None
    errors: list[str]

    def parse(self) -> Any:
        """Return (builder, network, parser)."""
        onnx = self.options.onnx
        try:
            return self.loaders.NetworkFromOnnxPath(str(onnx), strongly_typed=True)()
        except Exception as error:  # Polygraphy's own exception type, and pybind's
            raise EngineError(
                f"{onnx}: NVIDIA's ONNX parser refuses the graph: {_tell(self.errors, error)} "
                "Export again with `python -m export.build`, whose graph check names the node."
            ) from error

    def build(self, parsed: Any, on_progress: ProgressCallback | None) -> Any:
        """Return the serialized engine, a buffer."""
        trt, options = self.library.trt, self.options
        cache = timing_cache_path(options.plan.parent, self.library, self.gpu)
        monitor = make_progress_monitor(trt, on_progress)
        config = self.loaders.PostprocessConfig(
            self._config_loader(cache, monitor), lambda *made: _clear_tf32(trt, made[-1])
        )
        build = self.loaders.EngineBytesFromNetwork(
            parsed, config=config, save_timing_cache=None if cache is None else str(cache)
        )
        try:
            with warnings.catch_warnings():  # Polygraphy makes a cache that TensorRT-RTX ignores
                warnings.simplefilter("ignore", DeprecationWarning)
                return build()
        except Exception as error:  # Polygraphy's own exception type, and pybind's
            if monitor.interrupted:
                raise KeyboardInterrupt from error
            raise EngineError(
                f"{options.onnx}: {self.library.name} {self.library.version} cannot build the "
                f"graph for {options.target.name}: {_tell(self.errors, error)} If memory ran "
                "out, close other programs, lower --workspace, or add swap "
                "(`python -m engines.doctor BUNDLE`)."
            ) from error

    def _config_loader(self, cache: Path | None, monitor: Any) -> Any:
        trt = self.library.trt
        ranges = self.loaders.Profile()
        for name, shapes in self.profile.items():
            ranges.add(name, shapes.min, shapes.opt, shapes.max)
        common = {
            "profiles": [ranges],
            "memory_pool_limits": {trt.MemoryPoolType.WORKSPACE: workspace_of(self.options)},
            "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
            "progress_monitor": monitor,
            "load_timing_cache": str(cache) if cache and cache.is_file() else None,
            "builder_optimization_level": self.options.optimization_level,
        }
        if self.library.name == "tensorrt":
            return self.loaders.CreateConfig(**common)
        rtx = importlib.import_module("polygraphy.backend.tensorrt_rtx")
        capability = self.options.target.compute_capability
        return rtx.CreateConfigRTX(compute_capabilities=[capability], **common)


def _clear_tf32(trt: Any, config: Any) -> None:
    config.clear_flag(trt.BuilderFlag.TF32)


def _open(library: TrtLibrary, data: Any) -> Any:
    """Return the engine of a plan that was built on this GPU; None where it cannot be opened."""
    trt = library.trt
    runtime = trt.Runtime(process_logger(trt))
    return runtime.deserialize_cuda_engine(data)


def _inspect(trt: Any, engine: Any) -> EngineReport | None:
    inspector = engine.create_engine_inspector()
    return report_engine(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _every_message() -> AbstractContextManager[Any]:
    """Let Polygraphy pass on all that TensorRT says, the layers after fusion among it."""
    logger = importlib.import_module("polygraphy.logger").G_LOGGER
    verbosity: AbstractContextManager[Any] = logger.verbosity(logger.EXTRA_VERBOSE)
    return verbosity


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _tell(errors: list[str], error: Exception) -> str:
    """Return the first error, which is the cause of the others."""
    first = errors[0] if errors else " ".join(str(error).split())
    return first if first.endswith(".") else f"{first}."
