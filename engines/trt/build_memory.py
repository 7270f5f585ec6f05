"""Estimate how much memory building a plan takes, before it is tried.

CPU and GPU memory are added, because a Jetson has one memory for both. TensorRT-RTX's compiler
peaked at 0.5 GB plus three times the graph (docs/tensorrt.md). TensorRT on its device also holds
the weights once on the GPU, a CUDA context and its workspace. The figures for TensorRT itself are
estimates; its peak has not been measured yet.
"""

from __future__ import annotations

BASE_BYTES = 1_500_000_000
"""CUDA context, the library's kernels and Python, before any weight is read."""
BYTES_PER_ONNX_BYTE = 4.0
_MOST_WORKSPACE_BYTES = 1 << 30
"""More than this is not used by graphs of this kind, whatever the limit."""


def predict_build_bytes(onnx_bytes: int, workspace_bytes: int) -> int:
    """Predict the peak memory of building a plan."""
    workspace = min(workspace_bytes, _MOST_WORKSPACE_BYTES)
    return int(BASE_BYTES + BYTES_PER_ONNX_BYTE * onnx_bytes + workspace)


def add_swap_command(missing_bytes: int) -> str:
    """Return the command that adds swap for what is missing, and some more."""
    gigabytes = max(4, missing_bytes // 10**9 + 2)
    return (
        f"sudo fallocate -l {gigabytes}G /swapfile && sudo chmod 600 /swapfile && sudo mkswap "
        "/swapfile && sudo swapon /swapfile"
    )
