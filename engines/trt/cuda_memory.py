"""The calls of the CUDA runtime that running a plan needs: memory, one stream, one graph.

They go through ctypes to the `libcudart` of JetPack, a CUDA toolkit or a pip package, because a
JetPack image holds neither PyCUDA nor cuda-python. A failing call raises an `EngineError` with
CUDA's own words.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.errors import EngineError
from engines.trt.compiler_cache import find_cuda_runtime

_SONAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
_FOLDERS = ("/usr/local/cuda/lib64", "/usr/local/cuda/targets/aarch64-linux/lib")
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_CAPTURE_THREAD_LOCAL = 1  # cudaStreamCaptureMode
_NON_BLOCKING = ctypes.c_uint(1)  # cudaStreamNonBlocking
_Handle = ctypes.c_void_p


class Cuda(Protocol):
    """What a TensorRT session needs of CUDA. Pointers and handles are plain integers."""

    def allocate(self, size: int) -> int:
        """Return ``size`` bytes of device memory."""

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        """Return ``size`` bytes of page-locked host memory, uint8[size]."""

    def free(self, pointer: int) -> None:
        """Free device memory."""

    def free_pinned(self, buffer: NDArray[np.uint8]) -> None:
        """Free page-locked memory."""

    def create_stream(self) -> int:
        """Return a new stream."""

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""

    def copy_to_device(self, pointer: int, source: int, size: int, stream: int) -> None:
        """Queue a copy from page-locked memory."""

    def copy_to_host(self, destination: int, pointer: int, size: int, stream: int) -> None:
        """Queue a copy to page-locked memory."""

    def synchronize(self, stream: int) -> None:
        """Wait for everything queued."""

    def begin_capture(self, stream: int) -> None:
        """Record what is queued from now on instead of running it."""

    def end_capture(self, stream: int) -> int:
        """Return what was recorded as an executable graph."""

    def launch(self, graph: int, stream: int) -> None:
        """Queue a graph."""

    def destroy_graph(self, graph: int) -> None:
        """Destroy an executable graph."""


class CudaRuntime:
    """`Cuda` over a loaded `libcudart`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.cudaGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            reason = self._library.cudaGetErrorString(status).decode("utf-8", "replace")
            raise EngineError(
                f"CUDA refuses {name}: {reason} (error {status}). If memory ran out, close other "
                "programs or use a smaller batch; `python -m engines.doctor` shows the rest."
            )

    def allocate(self, size: int) -> int:
        """Return ``size`` bytes of device memory."""
        pointer = _Handle()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(1, size)))
        return pointer.value or 0

    def allocate_pinned(self, size: int) -> NDArray[np.uint8]:
        """Return ``size`` bytes of page-locked host memory, uint8[size]."""
        pointer = _Handle()
        self._call("cudaMallocHost", ctypes.byref(pointer), ctypes.c_size_t(max(1, size)))
        view = (ctypes.c_uint8 * size).from_address(pointer.value or 0)
        return np.ctypeslib.as_array(view)

    def free(self, pointer: int) -> None:
        """Free device memory."""
        self._call("cudaFree", _Handle(pointer))

    def free_pinned(self, buffer: NDArray[np.uint8]) -> None:
        """Free page-locked memory."""
        self._call("cudaFreeHost", _Handle(buffer.ctypes.data))

    def create_stream(self) -> int:
        """Return a new stream that neither waits for the legacy default stream nor stops it."""
        stream = _Handle()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", _Handle(stream))

    def copy_to_device(self, pointer: int, source: int, size: int, stream: int) -> None:
        """Queue a copy from page-locked memory."""
        self._copy(pointer, source, size, _TO_DEVICE, stream)

    def copy_to_host(self, destination: int, pointer: int, size: int, stream: int) -> None:
        """Queue a copy to page-locked memory."""
        self._copy(destination, pointer, size, _TO_HOST, stream)

    def _copy(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        ends = (_Handle(to), _Handle(source), ctypes.c_size_t(size))
        self._call("cudaMemcpyAsync", *ends, kind, _Handle(stream))

    def synchronize(self, stream: int) -> None:
        """Wait for everything queued."""
        self._call("cudaStreamSynchronize", _Handle(stream))

    def begin_capture(self, stream: int) -> None:
        """Record what is queued from now on instead of running it."""
        self._call("cudaStreamBeginCapture", _Handle(stream), _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """Return what was recorded as an executable graph."""
        graph, executable = _Handle(), _Handle()
        self._call("cudaStreamEndCapture", _Handle(stream), ctypes.byref(graph))
        instantiate = "cudaGraphInstantiateWithFlags"
        flags = ctypes.c_ulonglong(0)
        try:
            self._call(instantiate, ctypes.byref(executable), graph, flags)
        finally:
            self._call("cudaGraphDestroy", graph)
        return executable.value or 0

    def launch(self, graph: int, stream: int) -> None:
        """Queue a graph."""
        self._call("cudaGraphLaunch", _Handle(graph), _Handle(stream))

    def destroy_graph(self, graph: int) -> None:
        """Destroy an executable graph."""
        self._call("cudaGraphExecDestroy", _Handle(graph))


def open_cuda_runtime() -> CudaRuntime:
    """Load the machine's CUDA runtime.

    Raises:
        EngineError: there is none.
    """
    tried = []
    for candidate in _candidates():
        try:
            library = ctypes.CDLL(candidate)
        except OSError:
            tried.append(candidate)
            continue
        if not _is_too_new(library):
            return CudaRuntime(library)
        tried.append(f"{candidate}, which is newer than the driver")
    raise EngineError(
        f"The CUDA runtime is not installed (tried {'; '.join(tried)}). On a Jetson: sudo apt "
        "install nvidia-jetpack. Elsewhere: pip install nvidia-cuda-runtime-cu12."
    )


def _is_too_new(library: ctypes.CDLL) -> bool:
    """Tell whether the driver serves CUDA 12, say, and this is the runtime of 13."""
    runtime, driver = ctypes.c_int(), ctypes.c_int()
    library.cudaRuntimeGetVersion(ctypes.byref(runtime))
    library.cudaDriverGetVersion(ctypes.byref(driver))  # 0 where there is no driver
    return 0 < driver.value // 1000 < runtime.value // 1000


def _candidates() -> Iterator[str]:
    yield from _SONAMES
    folders = [Path(folder) for folder in _FOLDERS]
    folders += [path for entry in sys.path for path in Path(entry or ".").glob("nvidia/*/lib")]
    for folder in folders:
        yield from (str(path) for path in sorted(folder.glob("libcudart.so*"), reverse=True))
    if (with_compiler := find_cuda_runtime()) is not None:
        yield str(with_compiler)
