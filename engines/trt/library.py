"""Load NVIDIA's engine library: TensorRT, or TensorRT-RTX on a workstation.

Both have the same API, so everything that builds or runs a plan is written once against
`TrtLibrary.trt`. A process uses one of them, and Polygraphy is set to use the same.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engines.errors import EngineError
from engines.targets import Target
from engines.trt.compiler_cache import add_compiler_to_path

LibraryName = Literal["tensorrt", "tensorrt-rtx"]
_MODULES: dict[LibraryName, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_SHARED_OBJECTS: dict[LibraryName, str] = {
    "tensorrt": "libnvinfer.so",
    "tensorrt-rtx": "libtensorrt_rtx.so",
}
_POLYGRAPHY_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"


@dataclass(frozen=True)
class TrtLibrary:
    """A loaded library.

    Attributes:
        name: which of the two.
        trt: its bindings.
        version: of the shared library, to the build number: ``"10.3.0.26"``.
    """

    name: LibraryName
    trt: Any
    version: str


def load_library(name: LibraryName) -> TrtLibrary:
    """Import the bindings of a library.

    Raises:
        EngineError: it is not installed, or this process already drives the other one.
    """
    _claim_process(name)
    if name == "tensorrt-rtx":
        add_compiler_to_path()
    try:
        trt = importlib.import_module(_MODULES[name])
    except ImportError as error:
        raise EngineError(_explain_missing(name, error)) from error
    return TrtLibrary(name, trt, _library_version(name, str(trt.__version__)))


def load_library_for(target: Target) -> TrtLibrary:
    """Import the library that serves a target.

    Raises:
        EngineError: it is not installed, or of a version that does not know the device.
    """
    library = load_library("tensorrt-rtx" if target.engine == "tensorrt-rtx" else "tensorrt")
    complaint = target.explain_unsupported_tensorrt(library.version)
    if complaint:
        wanted = f"TensorRT {target.tensorrt_min} or newer"
        raise EngineError(
            f"--target {target.name}: {complaint}. Install {target.jetpack_releases or wanted} "
            "(`python -m engines.doctor` shows what is there)."
        )
    return library


def load_polygraphy(library: TrtLibrary) -> Any:
    """Import Polygraphy's TensorRT loaders, set to drive ``library`` and to log through `logging`.

    Raises:
        EngineError: Polygraphy is not installed.
    """
    _claim_process(library.name)
    try:
        logger = importlib.import_module("polygraphy.logger").G_LOGGER
        loaders = importlib.import_module("polygraphy.backend.trt")
    except ImportError as error:
        raise EngineError(
            f"Building an engine takes Polygraphy, which cannot be imported ({error}). "
            "Install it: pip install 'foveate[tensorrt]' (pure Python, also on a Jetson)."
        ) from error
    logger.use_python_logging_system = True
    logger.colors = logger.letter = False  # looking for colours prints to stdout
    logging.getLogger("Polygraphy").propagate = False
    return loaders


def _claim_process(name: LibraryName) -> None:
    wanted = "1" if name == "tensorrt-rtx" else "0"
    loaded = "polygraphy.config" in sys.modules
    if loaded and os.environ.get(_POLYGRAPHY_SWITCH, "0") != wanted:
        raise EngineError(
            f"This process already drives the other TensorRT library; {name} needs a process of "
            "its own. Build one target per command."
        )
    os.environ[_POLYGRAPHY_SWITCH] = wanted


def _explain_missing(name: LibraryName, error: ImportError) -> str:
    if name == "tensorrt-rtx":
        return (
            f"TensorRT-RTX is not installed ({error}). Get NVIDIA's compiler, which needs no GPU: "
            "python -m engines.install_trt_rtx"
        )
    return (
        f"TensorRT is not installed for this Python ({error}). On a Jetson it comes with JetPack: "
        "sudo apt install python3-libnvinfer, and make the environment with `python3 -m venv "
        "--system-site-packages`. Elsewhere: pip install tensorrt-cu12. "
        "`python -m engines.doctor` shows what is missing."
    )


def _library_version(name: LibraryName, bindings_version: str) -> str:
    """Return the shared library's version with its build number, which the bindings leave out."""
    path = _loaded_path(_SHARED_OBJECTS[name])
    if path is None:
        return bindings_version
    library = ctypes.CDLL(str(path))
    parts = ("Major", "Minor", "Patch", "Build")
    try:
        return ".".join(str(getattr(library, f"getInferLib{part}Version")()) for part in parts)
    except AttributeError:  # older than these functions
        return bindings_version


def _loaded_path(prefix: str) -> Path | None:
    try:
        lines = Path("/proc/self/maps").read_text("utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(f"{prefix}."):
            return path
    return None
