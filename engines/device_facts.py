"""Read what this machine is: board, JetPack, memory, power mode, libraries.

A fact that cannot be read is None. `engines.doctor` judges the facts.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engines.errors import EngineError
from engines.gpu import Gpu, NoGpu, find_gpu, read_power_mode
from engines.language_packages import find_missing_packages
from engines.trt.compiler_cache import add_compiler_to_path
from engines.trt.cuda_memory import open_cuda_runtime
from engines.trt.library import load_library

_JETPACKS = {
    "39.2.1": "7.2.1",
    "39.2.0": "7.2",
    "38.4.0": "7.1",
    "38.2.1": "7.0",
    "38.2.0": "7.0",
    "36.5.2": "6.2.3",
    "36.5.0": "6.2.2",
    "36.4.7": "6.2.1",
    "36.4.4": "6.2.1",
    "36.4.3": "6.2",
    "36.4.0": "6.1",
    "36.3.0": "6.0",
}
"""Release of Jetson Linux -> JetPack, from NVIDIA's JetPack archive as others copied it; 36.4.7, an
update without a JetPack of its own, from github.com/dusty-nv/jetson-containers. No other release is
guessed at: 36.4 holds two JetPacks."""


@dataclass(frozen=True)
class DeviceFacts:
    """One machine, sizes in bytes."""

    board: str | None
    """The device tree's model name, on an Arm board."""
    jetson_linux: str | None
    """For example ``"36.4.3"``; None off a Jetson."""
    gpu: Gpu | NoGpu
    tensorrt: str | None
    """Version to the build number."""
    tensorrt_problem: str
    """Why there is none."""
    compiler: bool
    """The ahead-of-time compiler is installed."""
    polygraphy: str | None
    cuda_runtime: bool
    memory_bytes: int
    available_bytes: int
    swap_bytes: int
    disk_bytes: int
    """Free where the bundles lie."""
    power_mode: str | None
    missing_backends: Mapping[str, str] = field(default_factory=dict)
    """Language backends that cannot run here -> what is missing."""

    @property
    def is_jetson(self) -> bool:
        """Whether this is a Jetson, also as a container sees it, which has no nv_tegra_release."""
        return self.jetson_linux is not None or "NVIDIA" in (self.board or "")

    @property
    def jetpack(self) -> str | None:
        """JetPack's release, as far as the table knows it."""
        return _JETPACKS.get(self.jetson_linux or "")


def read_facts(place: Path = Path(), root: Path = Path("/")) -> DeviceFacts:
    """Read the facts of this machine.

    Args:
        place: where bundles lie; its disk is measured.
        root: the system's root, another one in tests.
    """
    memory = read_memory(root / "proc/meminfo")
    tensorrt, problem = _find_tensorrt()
    return DeviceFacts(
        board=_read_text(root / "proc/device-tree/model"),
        jetson_linux=read_jetson_linux(root / "etc/nv_tegra_release"),
        gpu=find_gpu(),
        tensorrt=tensorrt,
        tensorrt_problem=problem,
        compiler=add_compiler_to_path(),
        polygraphy=_package_version("polygraphy"),
        cuda_runtime=_has_cuda_runtime(),
        memory_bytes=memory.get("MemTotal", 0),
        available_bytes=memory.get("MemAvailable", 0),
        swap_bytes=memory.get("SwapFree", 0),
        disk_bytes=shutil.disk_usage(place).free,
        power_mode=read_power_mode(),
        missing_backends=find_missing_packages(),
    )


def read_memory(meminfo: Path) -> dict[str, int]:
    """Read /proc/meminfo into bytes; empty where there is none."""
    found = {}
    for line in (_read_text(meminfo) or "").splitlines():
        match = re.match(r"(\w+):\s+(\d+) kB", line)
        if match:
            found[match.group(1)] = int(match.group(2)) * 1024
    return found


def read_jetson_linux(release: Path) -> str | None:
    """Read "# R36 (release), REVISION: 4.3, ..." as "36.4.3"."""
    match = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", _read_text(release) or "")
    return f"{match.group(1)}.{match.group(2)}" if match else None


def _find_tensorrt() -> tuple[str | None, str]:
    if importlib.util.find_spec("tensorrt") is None:
        return None, "this Python has no module tensorrt"
    try:
        return load_library("tensorrt").version, ""
    except EngineError as error:
        return None, str(error)


def _has_cuda_runtime() -> bool:
    try:
        open_cuda_runtime()
    except EngineError:
        return False
    return True


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip("\0\n ")
    except OSError:
        return None
