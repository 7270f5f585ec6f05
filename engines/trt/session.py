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
from pathlib import Path
from typing import Any

import numpy as np

from engines.errors import EngineError
from engines.session import Array, check_inputs
from engines.trt.cuda_memory import Cuda
from engines.trt.execution_context import make_context, open_kernel_cache
from engines.trt.library import TrtLibrary
from engines.trt.logger import process_logger
from engines.trt.wiring import DeviceTensor, QueuedValue, Shape, Wiring

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
_ALONE = Wiring()


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
        wiring: Wiring = _ALONE,
    ) -> None:
        """Load a plan.

        Args:
            plan: its bytes; they run as code, see `engines.trt.plan`.
            library: what built it.
            cuda: memory and streams.
            cuda_graphs: capture the tuned shape at once, another that comes twice in a row.
            kernel_cache: file of the kernels that TensorRT-RTX compiles at the first run; written
                when it was not there or did not fit.
            wiring: for one of several stages.

        Raises:
            EngineError: the library refuses the plan, it does not fit the stages beside it, or
                memory runs out.
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
        self._tensors: dict[str, DeviceTensor] = {}
        self._inputs: list[DeviceTensor] = []
        self._outputs: list[DeviceTensor] = []
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
        self._wiring = wiring
        self._stream: int | None = cuda.create_stream() if wiring.stream is None else wiring.stream
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
        """Run as many rows as the plan takes at once."""
        queued = self._queue_run(inputs, stream)
        self._cuda.synchronize(stream)
        return self._copy_out(queued)

    @property
    def most_rows(self) -> int:
        """The most rows the plan takes at once."""
        return self._most_rows

    def advance(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Queue a run on arrays, or on what another stage of the same stream has queued.

        Returns:
            `QueuedValue`s.

        Raises:
            EngineError: a name, shape or dtype is not what the plan takes, or it cannot be queued.
        """
        arrays = {name: one for name, one in values.items() if isinstance(one, np.ndarray)}
        if arrays or not values:
            check_inputs("The plan", self._wanted, arrays)
        with self._turn:
            if self._stream is None:
                raise EngineError("The session is closed; open it again to run it.")
            return dict(self._queue_run(values, self._stream))

    def fetch(self, values: Mapping[str, Any]) -> dict[str, Array]:
        """Wait for what was queued and copy it."""
        with self._turn:
            if self._stream is None:
                raise EngineError("The session is closed; open it again to run it.")
            self._cuda.synchronize(self._stream)
            return self._copy_out(values)

    def device_tensors(self) -> dict[str, DeviceTensor]:
        """Return the inputs and outputs that stay on the device, for the stages beside."""
        return {name: self._tensors[name] for name in self._wiring.on_device}

    @property
    def stream(self) -> int | None:
        """What runs are queued on; None once it is closed."""
        return self._stream

    def _queue_run(self, values: Mapping[str, Any], stream: int) -> dict[str, QueuedValue]:
        """Queue a run; where the plan takes no fewer rows, the last of an array is repeated."""
        given = [values[tensor.name] for tensor in self._inputs]
        rows = min(one.rows if isinstance(one, QueuedValue) else len(one) for one in given)
        shapes = tuple(
            one.shape
            if isinstance(one, QueuedValue)
            else (max(rows, self._fewest_rows), *one.shape[1:])
            for one in given
        )
        if shapes != self._shapes:
            self._change_shapes(shapes)
        for tensor, one, shape in zip(self._inputs, given, shapes, strict=True):
            if not isinstance(one, QueuedValue):
                view = tensor.view(shape)
                view[:rows] = one
                view[rows:] = one[-1:]
        outputs = self._output_shapes()
        self._execute(outputs, stream)
        return {name: QueuedValue(shape, rows) for name, shape in outputs.items()}

    def _copy_out(self, queued: Mapping[str, QueuedValue]) -> dict[str, Array]:
        return {
            name: self._tensors[name].view(value.shape)[: value.rows].copy()
            for name, value in queued.items()
        }

    def _output_shapes(self) -> dict[str, Shape]:
        """Return the outputs' shapes of the moment."""
        return {
            tensor.name: tuple(self._context.get_tensor_shape(tensor.name))
            for tensor in self._outputs
        }

    def _warm_up(self) -> None:
        """Run the tuned shape on zeros and capture it, before anything else uses the GPU."""
        stream = self._stream
        if stream is None:
            return
        self._change_shapes(tuple(tensor.opt for tensor in self._inputs))
        for _ in range(2 if self._captures else 1):
            self._execute(self._output_shapes(), stream)
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

    def _execute(self, outputs: Mapping[str, Shape], stream: int) -> None:
        """Queue copies and execution, from a captured graph where there is one.

        It is captured right after a run of the same shapes: TensorRT settles its state for new
        shapes, and may still allocate, in their first run.
        """
        if self._graph is None and self._captures and self._settled:
            self._graph = self._capture(outputs, stream)
        if self._graph is not None:
            self._cuda.launch(self._graph, stream)
            return
        self._settled = False
        self._queue(outputs, stream)
        self._settled = True

    def _capture(self, outputs: Mapping[str, Shape], stream: int) -> int | None:
        """Return the graph, or None, once and for all, where this plan cannot be captured."""
        self._cuda.begin_capture(stream)
        try:
            self._queue(outputs, stream)
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

    def _queue(self, outputs: Mapping[str, Shape], stream: int) -> None:
        for tensor, shape in zip(self._inputs, self._shapes, strict=True):
            if tensor.pinned is not None:
                source = tensor.view(shape)
                self._cuda.copy_to_device(tensor.device, source.ctypes.data, source.nbytes, stream)
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"{self._provider} could not run the plan: {self._logger.take()}.")
        for tensor in self._outputs:
            if tensor.pinned is not None:
                result = tensor.view(outputs[tensor.name])
                self._cuda.copy_to_host(result.ctypes.data, tensor.device, result.nbytes, stream)

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

    def _make_tensor(self, name: str, least: Shape, opt: Shape, most: Shape) -> DeviceTensor:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise EngineError(
                f'The plan\'s tensor "{name}" is {kind}, which NumPy does not have; expected one '
                f"of {', '.join(_DTYPES)}. Export the graph with FP32 inputs and outputs."
            )
        dtype = _DTYPES[kind]
        size = int(np.prod(most)) * dtype.itemsize
        lent = self._wiring.buffers.get(name)
        if lent is not None and (lent.dtype != dtype or lent.most_bytes < size):
            raise EngineError(
                f'The plans of the bundle do not fit each other: "{name}" is up to '
                f"{lent.dtype}{list(lent.max)} in one and {dtype}{list(most)} in the next. Build "
                "them together: python -m engines.build BUNDLE --rebuild"
            )
        device = self._cuda.allocate(size) if lent is None else lent.device
        pinned = None if name in self._wiring.on_device else self._cuda.allocate_pinned(size)
        self._context.set_tensor_address(name, device)
        tensor = DeviceTensor(
            name, dtype, least, opt, most, device, pinned, borrowed=lent is not None
        )
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
                if not tensor.borrowed:
                    self._cuda.free(tensor.device)
                if tensor.pinned is not None:
                    self._cuda.free_pinned(tensor.pinned)
            if self._wiring.stream is None:
                self._cuda.destroy_stream(self._stream)
            self._stream = None
            self._tensors.clear()
            # In this order: a context must not outlive its engine, nor an engine its runtime.
            self._context = self._engine = self._runtime = None
