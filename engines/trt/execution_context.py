"""Make the execution context of an engine, with what TensorRT-RTX keeps between runs.

TensorRT leaves the capture of CUDA graphs to its caller. TensorRT-RTX compiles kernels while it
runs, so only it knows when capturing is safe: it captures by itself, once it is told to. Its
kernels are kept in a file, or every start would compile them again.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import EngineError
from engines.staging import staged_file
from engines.trt.library import TrtLibrary
from engines.trt.plan import seal, unseal

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelCache:
    """Kernels that TensorRT-RTX compiled, in a file.

    Attributes:
        file: where they are kept.
        settings: the runtime configuration that uses them.
        kept: whether the file held kernels for this machine.
    """

    file: Path
    settings: Any
    kept: bool

    def save(self) -> None:
        """Write what was compiled if the file did not hold it; a full disk loses only this."""
        if self.kept:
            return
        with suppress(EngineError), staged_file(self.file, EngineError) as staged:
            staged.write_bytes(seal(bytes(self.settings.get_runtime_cache().serialize())))


def open_kernel_cache(library: TrtLibrary, engine: Any, file: Path | None) -> KernelCache | None:
    """Return the kernels of TensorRT-RTX, read where the file has them; None for TensorRT.

    Kernels are code, so only those that this user signed are read. TensorRT-RTX itself checks that
    they fit this GPU, driver and version, and refuses others.
    """
    if library.name == "tensorrt" or file is None:
        return None
    settings = engine.create_runtime_config()
    cache = settings.create_runtime_cache()
    kept = False
    if file.is_file():
        kernels = unseal(file.read_bytes())
        kept = kernels is not None and bool(cache.deserialize(kernels))
        if not kept:
            _LOG.warning(
                "%s was not written for this machine by this user; kernels are compiled anew.",
                file,
            )
    settings.set_runtime_cache(cache)
    return KernelCache(file, settings, kept)


def make_context(
    library: TrtLibrary, engine: Any, kernels: KernelCache | None = None, *, cuda_graphs: bool
) -> tuple[Any, bool]:
    """Return (context, whether the caller may capture what it queues).

    The context is None where the library cannot make one, most often for want of memory.
    """
    if library.name == "tensorrt" or (kernels is None and not cuda_graphs):
        return engine.create_execution_context(), cuda_graphs
    settings = kernels.settings if kernels is not None else engine.create_runtime_config()
    if cuda_graphs:
        settings.cuda_graph_strategy = library.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(runtime_config=settings), False
