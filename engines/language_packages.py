"""Find which language backends this Python cannot run, and which package is missing."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, distribution, requires

_MODULES = {"ort": "onnxruntime", "llamacpp": "llama_cpp", "openvino": "openvino"}
_PACKAGES = {"llamacpp": "llama-cpp-python"}
ORT_INSTALL = (
    "pip install 'foveate[cpu]', or 'foveate[cuda]' with an NVIDIA GPU; on a Jetson NVIDIA's wheel "
    "of onnxruntime-gpu for its JetPack, from pypi.jetson-ai-lab.io"
)
INSTALL = {
    "ort": ORT_INSTALL,
    "llamacpp": "pip install 'foveate[llamacpp]'",
    "openvino": "pip install 'foveate[openvino]'",
}
"""The command that mends it."""


def find_missing_packages() -> dict[str, str]:
    """Return, for each backend that cannot run here, what is not installed."""
    missing = {}
    for backend, module in _MODULES.items():
        package = _PACKAGES.get(backend, module)
        if importlib.util.find_spec(module) is None:
            missing[backend] = f"{package} is not installed"
        elif lacking := _missing_requirements(package):
            missing[backend] = f"{package} is installed, but not {', '.join(lacking)}"
    return missing


def _missing_requirements(package: str) -> list[str]:
    """Return what a package's metadata requires everywhere and is not installed."""
    try:
        wanted = [line for line in requires(package) or () if ";" not in line]
    except PackageNotFoundError:  # installed under another name, such as onnxruntime-gpu
        return []
    names = [match.group() for line in wanted if (match := re.match(r"[\w.-]+", line))]
    return [name for name in names if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
