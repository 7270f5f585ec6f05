"""Load llama.cpp's library once, and keep what it logs.

llama.cpp reports failures as a null pointer and writes the reason to stderr. The reason is kept for
the error message.
"""

from __future__ import annotations

import logging
from collections import deque
from functools import cache
from importlib import import_module
from typing import Any

from engines.errors import BackendError

BUILD_HINT = (
    "CMAKE_ARGS=\"-DCMAKE_C_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16' "
    "-DCMAKE_CXX_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'\" "
    "pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36"
)
"""How to build it for an x86 machine without the AMX kernels; see `uses_amx`."""

_log = logging.getLogger(__name__)
_ERROR = 4
_said: deque[str] = deque(maxlen=8)
_keep: list[Any] = []
"""The callback that C holds a pointer to."""


@cache
def load_llama_library() -> Any:
    """Return the `llama_cpp` module, with its log directed here.

    Raises:
        BackendError: llama-cpp-python is not installed, something that it imports is not, or its
            library does not load.
    """
    try:
        library = import_module("llama_cpp")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != "llama_cpp":
            raise BackendError(
                f"llama-cpp-python is installed, but not {error.name}, which it imports. Install "
                f"it with `pip install {error.name}`."
            ) from error
        raise BackendError(
            "The backend 'llamacpp' needs llama-cpp-python, which is not installed. Install it "
            'with `pip install "foveate[llamacpp]"`; on a Jetson with '
            'CMAKE_ARGS="-DGGML_CUDA=on" before it, so that layers can run on the GPU.'
        ) from error
    except (OSError, RuntimeError) as error:
        raise BackendError(
            f"llama-cpp-python is installed, but its library does not load ({error}). It was "
            f"built for another machine; build it here: {BUILD_HINT}"
        ) from error
    callback = library.llama_log_callback(_remember)
    _keep.append(callback)
    library.llama_log_set(callback, None)
    library.llama_backend_init()
    return library


def uses_amx(system_info: str) -> bool:
    """Return whether a build of llama.cpp would use its AMX kernels, given what it says of itself.

    They crash (a segmentation fault, not an error) on batches of quantized matrices; several
    reports of it are open at llama.cpp. A native build on a Xeon since Sapphire Rapids has them.
    """
    return "AMX_INT8 = 1" in system_info


def take_log() -> str:
    """Return llama.cpp's last errors as one line, and forget them."""
    words = " ".join("".join(_said).split())
    _said.clear()
    return words or "llama.cpp gave no reason"


def _remember(level: int, text: bytes, _: Any) -> None:
    line = text.decode("utf-8", "replace")
    if level == _ERROR:
        _said.append(line)
    if line.strip():
        _log.debug("%s", line.rstrip())
