"""Find NVIDIA's ahead-of-time compiler, TensorRT-RTX, in this user's cache."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

COMPILER_VERSION = "1.7.1.116"
PACKAGE = "tensorrt_rtx"
BINDINGS = "tensorrt_rtx_bindings"


def cache_root() -> Path:
    """Return where this user's downloads of Foveate lie (`FOVEATE_CACHE` moves it)."""
    if chosen := os.environ.get("FOVEATE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "foveate"


def compiler_home() -> Path:
    """Return the folder the compiler is imported from; it may not exist yet."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return cache_root() / f"tensorrt-rtx-{COMPILER_VERSION}-{python}"


def find_cuda_runtime() -> Path | None:
    """Return the CUDA runtime that came with the compiler, if it is installed."""
    return next((compiler_home() / BINDINGS).glob("libcudart.so.*"), None)


def add_compiler_to_path() -> bool:
    """Let `import tensorrt_rtx` find the compiler; return whether there is one to find."""
    if importlib.util.find_spec(PACKAGE) is not None:
        return True
    home = compiler_home()
    if not (home / PACKAGE).is_dir():
        return False
    sys.path.append(str(home))
    importlib.invalidate_caches()
    return True
