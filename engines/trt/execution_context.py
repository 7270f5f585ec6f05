"""An engine's execution context, and who records its CUDA graphs.

TensorRT leaves the recording to its caller. TensorRT-RTX compiles kernels while it runs, so only it
knows when recording is safe: it records by itself, once it is told to. Enters: a library and its
engine. Leaves: a context, and whether the caller may capture it.
"""

from __future__ import annotations

from typing import Any

from engines.trt.library import TrtLibrary


def make_context(library: TrtLibrary, engine: Any, *, cuda_graphs: bool) -> tuple[Any, bool]:
    """Return (context, whether the caller may capture what it queues).

    The context is None where the library cannot make one, most often for want of memory.
    """
    if library.name == "tensorrt" or not cuda_graphs:
        return engine.create_execution_context(), cuda_graphs
    settings = engine.create_runtime_config()
    settings.cuda_graph_strategy = library.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(runtime_config=settings), False
