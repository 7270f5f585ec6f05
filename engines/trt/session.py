"""A TensorRT or TensorRT-RTX plan behind the `Session` door.

Enters: a plan that `engines.trt.plan` found to be this machine's own. Leaves: a session whose
device and page-locked buffers are allocated once, at the profile's largest shapes. A shape that
comes twice is captured as a CUDA graph, so that a camera loop pays for one launch rather than for
hundreds. Only NVIDIA's bindings and `libcudart` are used, which a JetPack image holds.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
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
from engines.trt.library import TrtLibrary, load_library_for
from engines.trt.plan import machine_here, plan_path, read_plan, read_record

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
            cuda_graphs: capture a shape that comes a second time.

        Raises:
            EngineError: the library refuses the plan, or memory runs out.
        """
        trt = library.trt
        self._trt = trt
        self._cuda = cuda
        self._provider = f"{library.name} {library.version}"
        self._cuda_graphs = cuda_graphs
        self._turn = threading.Lock()
        self._graphs: dict[tuple[Shape, ...], int] = {}
        self._seen: set[tuple[Shape, ...]] = set()
        self._tensors: dict[str, _Tensor] = {}
        self._inputs: list[_Tensor] = []
        self._outputs: list[_Tensor] = []
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"{self._provider} refuses the plan ({len(plan):,} bytes); it says why above. "
                "Build it again: python -m engines.build BUNDLE --rebuild"
            )
        self._context = self._engine.create_execution_context()
        self._stream: int | None = cuda.create_stream()
        self._allocate()

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
            for tensor, shape in zip(self._inputs, shapes, strict=True):
                tensor.view(shape)[...] = inputs[tensor.name]
                self._context.set_input_shape(tensor.name, shape)
            results = {
                tensor.name: tensor.view(tuple(self._context.get_tensor_shape(tensor.name)))
                for tensor in self._outputs
            }
            self._execute(shapes, results, self._stream)
            self._cuda.synchronize(self._stream)
            return {name: result.copy() for name, result in results.items()}

    def _execute(
        self, shapes: tuple[Shape, ...], results: Mapping[str, Array], stream: int
    ) -> None:
        """Queue copies and execution, from a captured graph where there is one.

        The first run of a shape is not captured: TensorRT may still allocate in it.
        """
        graph = self._graphs.get(shapes)
        if graph is None and self._cuda_graphs and shapes in self._seen:
            self._cuda.begin_capture(stream)
            try:
                self._queue(shapes, results, stream)
            except BaseException:
                self._cuda.destroy_graph(self._cuda.end_capture(stream))  # or the stream is lost
                raise
            graph = self._graphs[shapes] = self._cuda.end_capture(stream)
        if graph is not None:
            self._cuda.launch(graph, stream)
            return
        self._queue(shapes, results, stream)
        self._seen.add(shapes)

    def _queue(self, shapes: tuple[Shape, ...], results: Mapping[str, Array], stream: int) -> None:
        for tensor, shape in zip(self._inputs, shapes, strict=True):
            size = tensor.view(shape).nbytes
            self._cuda.copy_to_device(tensor.device, tensor.pinned.ctypes.data, size, stream)
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"{self._provider} could not run the plan; it says why above.")
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
            for graph in self._graphs.values():
                self._cuda.destroy_graph(graph)
            for tensor in self._tensors.values():
                self._cuda.free(tensor.device)
                self._cuda.free_pinned(tensor.pinned)
            self._cuda.destroy_stream(self._stream)
            self._stream = None
            self._graphs.clear()
            self._tensors.clear()
            # In this order: a context must not outlive its engine, nor an engine its runtime.
            self._context = self._engine = self._runtime = None
