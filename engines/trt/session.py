"""Run a TensorRT or TensorRT-RTX plan as a `Session`.

Device and page-locked buffers are allocated once, at the profile's largest shapes. When the plan is
opened, the shape it is tuned for is run and captured as a CUDA graph, so that the first frame is as
quick as the others and a camera loop pays for one launch rather than for hundreds. Only NVIDIA's
bindings and `libcudart` are used, which a JetPack image holds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.errors import EngineError
from engines.gpu import NoGpu, find_gpu, read_power_mode
from engines.manifest import VisionGraph
from engines.session import Array, InputSpec, check_inputs
from engines.targets import Target
from engines.trt.cuda_memory import Cuda, open_cuda_runtime
from engines.trt.execution_context import make_context, open_kernel_cache
from engines.trt.library import TrtLibrary, load_library_for
from engines.trt.logger import process_logger
from engines.trt.plan import find_plan, machine_here, read_plan, read_record

_LOG = logging.getLogger(__name__)
_DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "INT8": np.dtype(np.int8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
}
_PROFILE = 0
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Tensor:
    """One input or output with its two buffers, as large as the profile allows."""

    name: str
    dtype: np.dtype[Any]
    min: Shape
    """Of an input; empty for an output."""
    opt: Shape
    """Likewise."""
    max: Shape
    device: int
    pinned: NDArray[np.uint8]

    def spec(self) -> InputSpec:
        """Return what `check_inputs` compares an input with; any number of rows is taken."""
        ranges = zip(self.min[1:], self.max[1:], strict=True)
        return InputSpec(self.dtype, ("rows", *(range(low, high + 1) for low, high in ranges)))

    def view(self, shape: Shape) -> Array:
        """Return the page-locked buffer as an array of a shape."""
        size = int(np.prod(shape)) * self.dtype.itemsize
        return self.pinned[:size].view(self.dtype).reshape(shape)


def open_trt_session(
    bundle: Bundle, graph: VisionGraph, target: Target, *, trust: bool = False, batch: int = 1
) -> TrtSession:
    """Open the plan of a bundle's graph that suits a number of images best.

    Args:
        bundle: an opened bundle.
        graph: one of its graphs.
        target: the device.
        trust: run a plan that another user or machine signed.
        batch: images in one run. More than the plan takes are run in several parts.

    Raises:
        EngineError: no plan, no GPU, no library, or a plan for something else.
    """
    plan = find_plan(bundle, graph, target, batch)
    record = read_record(plan)
    gpu = find_gpu()
    if isinstance(gpu, NoGpu):
        raise EngineError(
            f"{plan} is a plan for sm_{record.sm} ({target.title}) and cannot run here: "
            f"{gpu.reason}. Run it on that device, or build the bundle for this machine "
            "(python -m export.build --target cpu)."
        )
    library = load_library_for(target)
    sha256 = bundle.manifest.files[graph.file].sha256
    machine = machine_here(sha256, library, target, gpu, read_power_mode())
    data, _ = read_plan(plan, machine, trust=trust)
    cache = plan.with_suffix(".kernels") if library.name == "tensorrt-rtx" else None
    return TrtSession(data, library, open_cuda_runtime(), kernel_cache=cache)


class TrtSession(AbstractContextManager["TrtSession"]):
    """A loaded plan. Calls from several threads take turns."""

    def __init__(
        self,
        plan: bytes,
        library: TrtLibrary,
        cuda: Cuda,
        *,
        cuda_graphs: bool = True,
        kernel_cache: Path | None = None,
    ) -> None:
        """Load a plan.

        Args:
            plan: its bytes; they run as code, see `engines.trt.plan`.
            library: what built it.
            cuda: memory and streams.
            cuda_graphs: capture the tuned shape at once, another that comes twice in a row.
            kernel_cache: file of the kernels that TensorRT-RTX compiles at the first run; written
                when it was not there or did not fit.

        Raises:
            EngineError: the library refuses the plan, or memory runs out.
        """
        trt = library.trt
        self._trt = trt
        self._cuda = cuda
        self._provider = f"{library.name} {library.version}"
        self._turn = threading.Lock()
        self._shapes: tuple[Shape, ...] = ()
        """Of the inputs, as the context has them."""
        self._settled = False
        """A run has ended well since the shapes last changed."""
        self._graph: int | None = None
        self._tensors: dict[str, _Tensor] = {}
        self._inputs: list[_Tensor] = []
        self._outputs: list[_Tensor] = []
        self._logger = process_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"{self._provider} refuses the plan ({len(plan):,} bytes): {self._logger.take()}. "
                "Build it again: python -m engines.build BUNDLE --rebuild"
            )
        kernels = open_kernel_cache(library, self._engine, kernel_cache)
        self._context, self._captures = make_context(
            library, self._engine, kernels, cuda_graphs=cuda_graphs
        )
        if self._context is None:
            raise EngineError(
                f"{self._provider} cannot make room to run the plan: {self._logger.take()}. Close "
                "other programs, or build it for a smaller batch: python -m engines.build BUNDLE "
                "--batch 1 --rebuild"
            )
        self._stream: int | None = cuda.create_stream()
        try:
            self._allocate()
            self._warm_up()
            if kernels is not None:
                kernels.save()
        except BaseException:
            self.close()
            raise

    @property
    def provider(self) -> str:
        """The library and its version."""
        return self._provider

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names `run` takes."""
        return tuple(tensor.name for tensor in self._inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names `run` returns."""
        return tuple(tensor.name for tensor in self._outputs)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph on any number of rows; the arrays returned belong to the caller.

        More rows than the plan takes at once are run in several parts.

        Raises:
            EngineError: a name, shape or dtype is not what the plan takes, or the run failed.
        """
        rows = check_inputs("The plan", self._wanted, inputs)["rows"]
        parts = []
        with self._turn:
            if self._stream is None:
                raise EngineError("The session is closed; open it again to run it.")
            for first in range(0, rows, self._most_rows):
                part = {
                    name: array[first : first + self._most_rows] for name, array in inputs.items()
                }
                parts.append(self._run_part(part, self._stream))
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.output_names}

    def _run_part(self, inputs: Mapping[str, Array], stream: int) -> dict[str, Array]:
        """Run as many rows as the plan takes; where it takes no fewer, the last is repeated."""
        rows = len(inputs[self._inputs[0].name])
        shapes = tuple(
            (max(rows, self._fewest_rows), *inputs[tensor.name].shape[1:])
            for tensor in self._inputs
        )
        if shapes != self._shapes:
            self._change_shapes(shapes)
        for tensor, shape in zip(self._inputs, shapes, strict=True):
            view = tensor.view(shape)
            view[:rows] = inputs[tensor.name]
            view[rows:] = inputs[tensor.name][-1:]
        results = self._results()
        self._execute(results, stream)
        self._cuda.synchronize(stream)
        return {name: result[:rows].copy() for name, result in results.items()}

    def _results(self) -> dict[str, Array]:
        """Return the outputs' page-locked buffers in the shapes of the moment."""
        return {
            tensor.name: tensor.view(tuple(self._context.get_tensor_shape(tensor.name)))
            for tensor in self._outputs
        }

    def _warm_up(self) -> None:
        """Run the tuned shape on zeros and capture it, before anything else uses the GPU."""
        stream = self._stream
        if stream is None:
            return
        self._change_shapes(tuple(tensor.opt for tensor in self._inputs))
        for _ in range(2 if self._captures else 1):
            self._execute(self._results(), stream)
            self._cuda.synchronize(stream)

    def _change_shapes(self, shapes: tuple[Shape, ...]) -> None:
        """Tell the context; a graph captured before is void, as the context's state changes."""
        self._settled, self._shapes = False, ()
        self._drop_graph()
        for tensor, shape in zip(self._inputs, shapes, strict=True):
            if not self._context.set_input_shape(tensor.name, shape):
                raise EngineError(
                    f'{self._provider} refuses {list(shape)} for "{tensor.name}": '
                    f"{self._logger.take()}."
                )
        self._shapes = shapes

    def _execute(self, results: Mapping[str, Array], stream: int) -> None:
        """Queue copies and execution, from a captured graph where there is one.

        It is captured right after a run of the same shapes: TensorRT settles its state for new
        shapes, and may still allocate, in their first run.
        """
        if self._graph is None and self._captures and self._settled:
            self._graph = self._capture(results, stream)
        if self._graph is not None:
            self._cuda.launch(self._graph, stream)
            return
        self._settled = False
        self._queue(results, stream)
        self._settled = True

    def _capture(self, results: Mapping[str, Array], stream: int) -> int | None:
        """Return the graph, or None, once and for all, where this plan cannot be captured."""
        self._cuda.begin_capture(stream)
        try:
            self._queue(results, stream)
            return self._cuda.end_capture(stream)
        except BaseException as error:
            self._captures = False
            with suppress(EngineError):  # a stream that goes on capturing is lost
                self._cuda.destroy_graph(self._cuda.end_capture(stream))
            if not isinstance(error, EngineError):
                raise
            _LOG.warning("No CUDA graph of this plan, so each run costs more: %s", error)
            return None

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._cuda.destroy_graph(self._graph)
            self._graph = None

    def _queue(self, results: Mapping[str, Array], stream: int) -> None:
        for tensor, shape in zip(self._inputs, self._shapes, strict=True):
            size = tensor.view(shape).nbytes
            self._cuda.copy_to_device(tensor.device, tensor.pinned.ctypes.data, size, stream)
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"{self._provider} could not run the plan: {self._logger.take()}.")
        for tensor in self._outputs:
            size = results[tensor.name].nbytes
            self._cuda.copy_to_host(tensor.pinned.ctypes.data, tensor.device, size, stream)

    def _allocate(self) -> None:
        """Allocate every buffer at the largest shapes and tell the context where they are."""
        engine, context = self._engine, self._context
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = self._trt.TensorIOMode.INPUT
        inputs = [name for name in names if engine.get_tensor_mode(name) == is_input]
        for name in inputs:
            least, opt, most = map(tuple, engine.get_tensor_profile_shape(name, _PROFILE))
            context.set_input_shape(name, most)
            self._inputs.append(self._make_tensor(name, least, opt, most))
        self._wanted = {tensor.name: tensor.spec() for tensor in self._inputs}
        self._fewest_rows = max(tensor.min[0] for tensor in self._inputs)
        self._most_rows = min(tensor.max[0] for tensor in self._inputs)
        for name in names:
            if name not in inputs:
                shape = tuple(context.get_tensor_shape(name))
                self._outputs.append(self._make_tensor(name, (), (), shape))

    def _make_tensor(self, name: str, least: Shape, opt: Shape, most: Shape) -> _Tensor:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise EngineError(
                f'The plan\'s tensor "{name}" is {kind}, which NumPy does not have; expected one '
                f"of {', '.join(_DTYPES)}. Export the graph with FP32 inputs and outputs."
            )
        dtype = _DTYPES[kind]
        size = int(np.prod(most)) * dtype.itemsize
        device, pinned = self._cuda.allocate(size), self._cuda.allocate_pinned(size)
        self._context.set_tensor_address(name, device)
        tensor = _Tensor(name, dtype, least, opt, most, device, pinned)
        self._tensors[name] = tensor
        return tensor

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the plan and its buffers; calling it again does nothing."""
        with self._turn:
            if self._stream is None:
                return
            self._cuda.synchronize(self._stream)
            self._drop_graph()
            for tensor in self._tensors.values():
                self._cuda.free(tensor.device)
                self._cuda.free_pinned(tensor.pinned)
            self._cuda.destroy_stream(self._stream)
            self._stream = None
            self._tensors.clear()
            # In this order: a context must not outlive its engine, nor an engine its runtime.
            self._context = self._engine = self._runtime = None
