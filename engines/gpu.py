"""Ask which NVIDIA GPU this machine has and, on a Jetson, its power mode.

Only `libcuda` is used. Every machine with an NVIDIA driver has it, a Jetson included; the CUDA
toolkit and NVML are not needed.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_DRIVER_LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
_TEGRA_FOLDERS = ("/usr/lib/aarch64-linux-gnu/nvidia", "/usr/lib/aarch64-linux-gnu/tegra")
_MAJOR, _MINOR, _INTEGRATED, _MULTIPROCESSORS = 75, 76, 18, 16  # CUdevice_attribute
_NAME_BYTES = 256
_TOOL_SECONDS = 10


@dataclass(frozen=True)
class Gpu:
    """The first GPU of this machine.

    Attributes:
        name: as the driver calls it, for example ``"Orin"``.
        sm: compute capability without its dot, 87 for 8.7.
        memory_bytes: all of it, used or not.
        integrated: shares its memory with the CPU, as on a Jetson.
        cuda: newest CUDA version the driver serves.
        driver: the driver's own version, ``"unknown"`` where the system does not say.
        multiprocessors: how many it has; None where it was not asked for.
    """

    name: str
    sm: int
    memory_bytes: int
    integrated: bool
    cuda: str
    driver: str
    multiprocessors: int | None = None


@dataclass(frozen=True)
class NoGpu:
    """There is no GPU to use, and why."""

    reason: str


def find_gpu() -> Gpu | NoGpu:
    """Ask the CUDA driver for GPU 0."""
    library = _open_driver()
    if library is None:
        return NoGpu(
            "no NVIDIA driver is installed (libcuda.so.1 is not found; a container sees it when "
            "started with --runtime nvidia or --gpus all)"
        )
    status = library.cuInit(0)
    if status != 0:
        return NoGpu(f"the NVIDIA driver does not start (cuInit returns {_error(library, status)})")
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    if count.value == 0:
        return NoGpu("the NVIDIA driver finds no GPU (is CUDA_VISIBLE_DEVICES empty?)")
    name = ctypes.create_string_buffer(_NAME_BYTES)
    library.cuDeviceGetName(name, _NAME_BYTES, 0)
    memory = ctypes.c_size_t()
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), 0)
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    return Gpu(
        name=name.value.decode("utf-8", "replace"),
        sm=_attribute(library, _MAJOR) * 10 + _attribute(library, _MINOR),
        memory_bytes=memory.value,
        integrated=_attribute(library, _INTEGRATED) == 1,
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        driver=driver_version(),
        multiprocessors=_attribute(library, _MULTIPROCESSORS),
    )


def driver_version(proc: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the kernel driver's version, ``"unknown"`` where the system does not say."""
    try:
        text = proc.read_text("utf-8", "replace")
    except OSError:
        return "unknown"
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else "unknown"


def _open_driver() -> ctypes.CDLL | None:
    folders = [f"{folder}/libcuda.so.1" for folder in _TEGRA_FOLDERS]
    for name in (*_DRIVER_LIBRARIES, *folders):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _attribute(library: ctypes.CDLL, attribute: int) -> int:
    value = ctypes.c_int()
    library.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
    return value.value


def _error(library: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorString(status, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {status}"


def read_power_mode() -> str | None:
    """Ask nvpmodel for the power mode, "MAXN" for example; None off a Jetson."""
    if shutil.which("nvpmodel") is None:
        return None
    try:
        done = subprocess.run(
            ["nvpmodel", "-q"], capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"NV Power Mode:\s*(\S+)", done.stdout)
    return match.group(1) if match else None
