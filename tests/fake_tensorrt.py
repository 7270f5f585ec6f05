"""Stand-ins for TensorRT and CUDA: device memory is host memory, an engine is a NumPy function.

They hold the session to the rules it can break without a GPU: addresses set before execution, the
input shape set before each run, nothing executed while a stream is being captured, nothing captured
before a run has settled the shape, no graph launched once the shape has changed, every buffer freed
once. They say nothing about TensorRT itself; the `gpu` tests do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import EngineError


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class DataType(Enum):
    FLOAT = 0
    INT64 = 1
    FP8 = 2


_NUMPY = {DataType.FLOAT: np.float32, DataType.INT64: np.int64}


@dataclass(frozen=True)
class FakeTensor:
    name: str
    mode: TensorIOMode
    dtype: DataType
    shape: tuple[int, ...]
    """-1 is the batch, -2 the number of tokens, which the first input has as well."""


TENSORS = (
    FakeTensor("pixel_values", TensorIOMode.INPUT, DataType.FLOAT, (-1, 4)),
    FakeTensor("visual_tokens", TensorIOMode.OUTPUT, DataType.FLOAT, (-1, 2, 2)),
    FakeTensor("patch_index", TensorIOMode.OUTPUT, DataType.INT64, (-1, 2)),
)


def run_model(pixels: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """What the fake engine computes."""
    order = np.argsort(pixels, axis=1)[:, :2]
    tokens = np.stack([pixels[:, :2], pixels[:, 2:] * 2], axis=1)
    return {"visual_tokens": tokens.astype(np.float32), "patch_index": order.astype(np.int64)}


@dataclass
class FakeCuda:
    """`engines.trt.cuda_memory.Cuda` on host memory, with a queue that runs on synchronize."""

    memory: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    queue: list[Callable[[], None]] = field(default_factory=list)
    capture: list[Callable[[], None]] | None = None
    cannot_capture: bool = False
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    stale: set[int] = field(default_factory=set)
    """Graphs of a shape that the context has no longer."""
    calls: list[str] = field(default_factory=list)
    streams: int = 0
    captured: FakeContext | None = None
    """What was executed last."""
    contexts: dict[int, FakeContext | None] = field(default_factory=dict)
    """What a graph executes."""

    def _enqueue(self, work: Callable[[], None]) -> None:
        (self.queue if self.capture is None else self.capture).append(work)

    def allocate(self, size: int) -> int:
        block = np.zeros(size, np.uint8)
        self.memory[block.ctypes.data] = block
        return block.ctypes.data

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        block = np.zeros(size, np.uint8)
        self.pinned.add(block.ctypes.data)
        return block

    def free(self, pointer: int) -> None:
        del self.memory[pointer]

    def free_pinned(self, buffer: NDArray[np.uint8]) -> None:
        self.pinned.remove(buffer.ctypes.data)

    def create_stream(self) -> int:
        self.streams += 1
        return 7

    def destroy_stream(self, stream: int) -> None:
        self.streams -= 1

    def copy_to_device(self, pointer: int, source: int, size: int, stream: int) -> None:
        assert pointer in self.memory and source in self.pinned
        assert size <= self.memory[pointer].nbytes
        self._enqueue(lambda: void(ctypes.memmove(pointer, source, size)))

    def copy_to_host(self, destination: int, pointer: int, size: int, stream: int) -> None:
        assert pointer in self.memory and destination in self.pinned
        assert size <= self.memory[pointer].nbytes
        self._enqueue(lambda: void(ctypes.memmove(destination, pointer, size)))

    def synchronize(self, stream: int) -> None:
        assert self.capture is None, "synchronizing a stream that is being captured"
        for work in self.queue:
            work()
        self.queue.clear()

    def begin_capture(self, stream: int) -> None:
        self.calls.append("capture")
        self.capture = []

    def end_capture(self, stream: int) -> int:
        if self.cannot_capture or self.capture is None:
            self.capture = None
            raise EngineError("CUDA refuses cudaStreamEndCapture: capture invalidated")
        number = max(self.graphs, default=0) + 1
        self.graphs[number], self.capture = self.capture, None
        self.contexts[number] = self.captured
        return number

    def launch(self, graph: int, stream: int) -> None:
        assert graph not in self.stale, "launching a graph of another shape"
        self.calls.append("launch")
        self.queue += self.graphs[graph]

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]
        self.stale.discard(graph)


def void(_: object) -> None:
    """Turn an expression into a statement."""


Model = Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def run_pixels(inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return run_model(inputs["pixel_values"])


class FakeContext:
    def __init__(
        self, cuda: FakeCuda, tensors: tuple[FakeTensor, ...], model: Model = run_pixels
    ) -> None:
        self.cuda = cuda
        self.model = model
        self.tokens = 0
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.addresses: dict[str, int] = {}
        self.batch: int | None = None
        self.settled = False
        """A run outside capture has seen the shape."""
        self.fails = False

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        sizes = dict(zip(self.tensors[name].shape, shape, strict=True))
        batch, tokens = sizes[-1], sizes.get(-2, self.tokens)
        if (batch, tokens) != (self.batch, self.tokens):
            self.settled = False
            self.cuda.stale |= {
                number for number, context in self.cuda.contexts.items() if context is self
            } & set(self.cuda.graphs)
        self.batch, self.tokens = batch, tokens
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.batch is not None
        sizes = {-1: self.batch, -2: self.tokens}
        return tuple(sizes.get(size, size) for size in self.tensors[name].shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert set(self.addresses) == set(self.tensors), "an address was not set"
        self.cuda.calls.append("execute")
        assert self.batch is not None
        assert self.settled or self.cuda.capture is None, "captured before a run settled the shape"
        self.settled = not self.fails
        self.cuda.captured = self
        shapes = {name: self.get_tensor_shape(name) for name in self.tensors}

        def work() -> None:
            inputs = {
                name: self._array(name, shapes[name])
                for name, tensor in self.tensors.items()
                if tensor.mode is TensorIOMode.INPUT
            }
            for name, value in self.model(inputs).items():
                if name in self.addresses:
                    self._array(name, shapes[name])[...] = value

        self.cuda._enqueue(work)
        return not self.fails

    def _array(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        dtype = np.dtype(_NUMPY[self.tensors[name].dtype])
        block = self.cuda.memory[self.addresses[name]]
        return block[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)


class FakeEngine:
    def __init__(
        self,
        cuda: FakeCuda,
        tensors: tuple[FakeTensor, ...],
        *,
        full: bool = False,
        batches: tuple[int, int, int] = (1, 1, 8),
        tokens: tuple[int, int, int] = (1, 1, 1),
        model: Model = run_pixels,
    ) -> None:
        self.tensors = tensors
        self.batches, self.tokens = batches, tokens
        self.context = None if full else FakeContext(cuda, tensors, model)
        self.settings: FakeSettings | None = None
        self.num_io_tensors = len(tensors)

    def _tensor(self, name: str) -> FakeTensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def create_runtime_config(self) -> FakeSettings:
        return FakeSettings()

    def create_execution_context(
        self, runtime_config: FakeSettings | None = None
    ) -> FakeContext | None:
        self.settings = runtime_config
        return self.context

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index].name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._tensor(name).mode

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._tensor(name).dtype

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        shape = self._tensor(name).shape
        return [
            tuple({-1: batch, -2: tokens}.get(size, size) for size in shape)
            for batch, tokens in zip(self.batches, self.tokens, strict=True)
        ]


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    Severity = Severity


class FakeKernels:
    """`IRuntimeCache` of TensorRT-RTX; it takes what a cache like it wrote."""

    def deserialize(self, blob: bytes) -> bool:
        return blob == b"kernels"

    def serialize(self) -> bytes:
        return b"kernels"


class FakeSettings:
    """`IRuntimeConfig` of TensorRT-RTX."""

    cuda_graph_strategy = "DISABLED"
    cache: FakeKernels | None = None

    def create_runtime_cache(self) -> FakeKernels:
        return FakeKernels()

    def set_runtime_cache(self, cache: FakeKernels) -> bool:
        self.cache = cache
        return True

    def get_runtime_cache(self) -> FakeKernels | None:
        return self.cache


class FakeModule(SimpleNamespace):
    """A module is hashable, a plain namespace is not."""

    __hash__ = object.__hash__


def make_fake_trt(
    cuda: FakeCuda,
    tensors: tuple[FakeTensor, ...] = TENSORS,
    *,
    refuses: bool = False,
    full: bool = False,
    batches: tuple[int, int, int] = (1, 1, 8),
    tokens: tuple[int, int, int] = (1, 1, 1),
    model: Model = run_pixels,
) -> FakeModule:
    """Return a module-like object with what the session uses of the bindings.

    Args:
        cuda: where its engines run.
        tensors: of its engines.
        refuses: a plan is not loaded, with two errors and a warning said.
        full: no memory is left for a context.
        batches: smallest, tuned and largest of the profile.
        tokens: the same of the number of tokens.
        model: what its engines compute.
    """

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeEngine | None:
            if refuses:
                self.logger.log(Severity.WARNING, "slow")
                self.logger.log(Severity.ERROR, "magicTag\n  failed.")
                self.logger.log(Severity.INTERNAL_ERROR, "therefore")
                return None
            return FakeEngine(cuda, tensors, full=full, batches=batches, tokens=tokens, model=model)

    return FakeModule(
        ILogger=ILogger,
        Runtime=Runtime,
        TensorIOMode=TensorIOMode,
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE"),
    )
