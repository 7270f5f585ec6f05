"""A TensorRT or TensorRT-RTX plan behind the `Session` door.

Enters: a plan that `engines.trt.plan` found to be this machine's own. Leaves: a session whose
device and page-locked buffers are allocated once, at the profile's largest shapes. A shape that
comes twice in a row is captured as a CUDA graph, so that a camera loop pays for one launch rather
than for hundreds. Only NVIDIA's bindings and `libcudart` are used, which a JetPack image holds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.closeable import Closeable
from engines.errors import EngineError
from engines.gpu import NoGpu, find_gpu
from engines.manifest import VisionGraph
from engines.session import Array
from engines.targets import Target
from engines.trt.cuda_memory import Cuda, open_cuda_runtime
from engines.trt.execution_context import make_context
from engines.trt.library import TrtLibrary, load_library_for
from engines.trt.logger import make_logger
from engines.trt.plan import machine_here, plan_path, read_plan, read_record

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
    smallest: Shape
    """Of an input; empty for an output."""
    largest: Shape
    device: int
    pinned: NDArray[np.uint8]

    def view(self, shape: Shape) -> Array:
        """Return the page-locked buffer as an array of a shape."""
        size = int(np.prod(shape)) * self.dtype.itemsize
        return self.pinned[:size].view(self.dtype).reshape(shape)


def open_trt_session(
    bundle: Bundle, graph: VisionGraph, target: Target, *, trust: bool = False
) -> TrtSession:
    """Open the plan of a bundle's graph.

    Args:
        bundle: an opened bundle.
        graph: one of its graphs.
        target: the device.
        trust: run a plan that another user or machine signed.

    Raises:
        EngineError: no plan, no GPU, no library, or a plan for something else.
    """
    plan = plan_path(bundle, graph, target)
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
    data, _ = read_plan(plan, machine_here(sha256, library, target, gpu), trust=trust)
    return TrtSession(data, library, open_cuda_runtime())


class TrtSession(Closeable):
    """A loaded plan. Calls from several threads take turns."""

    def __init__(
        self, plan: bytes, library: TrtLibrary, cuda: Cuda, *, cuda_graphs: bool = True
    ) -> None:
        """Load a plan.

        Args:
            plan: its bytes; they run as code, see `engines.trt.plan`.
            library: what built it.
            cuda: memory and streams.
            cuda_graphs: capture a shape that comes a second time in a row.

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
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"{self._provider} refuses the plan ({len(plan):,} bytes): {self._logger.take()}. "
                "Build it again: python -m engines.build BUNDLE --rebuild"
            )
        self._context, self._captures = make_context(library, self._engine, cuda_graphs=cuda_graphs)
        if self._context is None:
            raise EngineError(
                f"{self._provider} cannot make room to run the plan: {self._logger.take()}. Close "
                "other programs, or build it for a smaller batch: python -m engines.build BUNDLE "
                "--batch 1 --rebuild"
            )
        self._stream: int | None = cuda.create_stream()
        try:
            self._allocate()
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
        """Run the graph once; the arrays returned belong to the caller.

        Raises:
            EngineError: a name, shape or dtype is not what the plan takes, or the run failed.
        """
        self._check_inputs(inputs)
        with self._turn:
            if self._stream is None:
                raise EngineError("The session is closed; open it again to run it.")
            shapes = tuple(tuple(inputs[tensor.name].shape) for tensor in self._inputs)
            if shapes != self._shapes:
                self._change_shapes(shapes)
            for tensor, shape in zip(self._inputs, shapes, strict=True):
                tensor.view(shape)[...] = inputs[tensor.name]
            results = {
                tensor.name: tensor.view(tuple(self._context.get_tensor_shape(tensor.name)))
                for tensor in self._outputs
            }
            self._execute(results, self._stream)
            self._cuda.synchronize(self._stream)
            return {name: result.copy() for name, result in results.items()}

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
            smallest, _, largest = engine.get_tensor_profile_shape(name, _PROFILE)
            context.set_input_shape(name, tuple(largest))
            self._inputs.append(self._make_tensor(name, tuple(smallest), tuple(largest)))
        for name in names:
            if name not in inputs:
                shape = tuple(context.get_tensor_shape(name))
                self._outputs.append(self._make_tensor(name, (), shape))

    def _make_tensor(self, name: str, smallest: Shape, largest: Shape) -> _Tensor:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise EngineError(
                f'The plan\'s tensor "{name}" is {kind}, which NumPy does not have; expected one '
                f"of {', '.join(_DTYPES)}. Export the graph with FP32 inputs and outputs."
            )
        dtype = _DTYPES[kind]
        size = int(np.prod(largest)) * dtype.itemsize
        device, pinned = self._cuda.allocate(size), self._cuda.allocate_pinned(size)
        self._context.set_tensor_address(name, device)
        tensor = _Tensor(name, dtype, smallest, largest, device, pinned)
        self._tensors[name] = tensor
        return tensor

    def _check_inputs(self, inputs: Mapping[str, Array]) -> None:
        wanted = {tensor.name: tensor for tensor in self._inputs}
        problems = [f'"{name}" is missing' for name in wanted if name not in inputs]
        problems += [f'"{name}" is not an input' for name in inputs if name not in wanted]
        for name, tensor in wanted.items():
            array = inputs.get(name)
            if array is None:
                continue
            ranges = zip(tensor.smallest, array.shape, tensor.largest, strict=False)
            fits = array.ndim == len(tensor.largest) and all(a <= b <= c for a, b, c in ranges)
            if not fits or array.dtype != tensor.dtype:
                problems.append(
                    f'"{name}" is {array.dtype}{list(array.shape)}, expected {tensor.dtype} from '
                    f"{list(tensor.smallest)} to {list(tensor.largest)}"
                )
        if problems:
            raise EngineError(
                f"The plan cannot be run on these inputs: {'; '.join(problems)}. Another batch "
                "takes another plan: python -m engines.build BUNDLE --batch ... --rebuild"
            )

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
