"""Count what a process takes before any model is loaded."""

from __future__ import annotations

from engines.memory.parts import MemoryPart

PROCESS_BYTES = 65_000_000
"""Python, NumPy and the backend's library: 58 MB with ONNX Runtime, 69 MB with llama.cpp."""
CUDA_CONTEXT_BYTES = 300_000_000
"""One process's CUDA context with kernels that are loaded when first used (CUDA 11.7 on):
github.com/pytorch/pytorch/issues/107667. It has not been measured on a Jetson."""


def process_parts(*, cuda: bool) -> list[MemoryPart]:
    """List them."""
    parts = [MemoryPart("Python and libraries", PROCESS_BYTES)]
    if cuda:
        parts.append(MemoryPart("CUDA context", CUDA_CONTEXT_BYTES, "gpu", "estimate"))
    return parts
