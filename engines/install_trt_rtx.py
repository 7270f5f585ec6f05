"""Install NVIDIA's parser and compiler, TensorRT-RTX, for this user; no GPU is needed.

Two wheels from PyPI, pinned by hash in `install_trt_rtx.txt`, are unpacked into a folder in the
user's cache that Python can import `tensorrt_rtx` from. One wheel holds the Python bindings, the
other (meant for ONNX Runtime) the libraries they bind. Foveate contains nothing of either.
`python -m engines.install_trt_rtx` takes about a minute and 350 MB, once.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import zipfile
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from engines import cli
from engines.errors import EngineError
from engines.staging import staged_directory
from engines.trt.compiler_cache import (
    BINDINGS,
    COMPILER_VERSION,
    PACKAGE,
    add_compiler_to_path,
    compiler_home,
)

_LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
_LINKED = ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so", "libcudart.so")
_INSTALL = "python -m engines.install_trt_rtx"
EXAMPLES = (_INSTALL,)
_SHIM = f"""# Written by Foveate: the name that NVIDIA's own meta-package gives the bindings.
from {BINDINGS} import *  # noqa: F403
from {BINDINGS} import __version__  # noqa: F401
"""


def install_compiler() -> Path:
    """Download, check and unpack the compiler; return its folder. Does nothing when it is there.

    Raises:
        EngineError: this platform has no such wheels, or they cannot be downloaded.
    """
    home = compiler_home()
    if (home / PACKAGE).is_dir():
        return home
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise EngineError(
            f"The ahead-of-time compiler exists for Linux on x86-64, this is {sys.platform} on "
            f"{platform.machine()}. Build the engine on such a machine and copy the bundle here, "
            "or install NVIDIA's tensorrt_rtx package."
        )
    with (
        staged_directory(home, EngineError) as folder,
        tempfile.TemporaryDirectory(dir=home.parent) as downloads,
    ):
        _unpack_wheels(_download_wheels(Path(downloads)), folder)
    return home


def _download_wheels(folder: Path) -> list[Path]:
    with resources.as_file(resources.files("engines") / "install_trt_rtx.txt") as pinned:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--only-binary", ":all:", "--dest", str(folder), "--requirement", str(pinned)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise EngineError(
            "NVIDIA's compiler cannot be downloaded: "
            f"{' '.join(said) or done.stderr.strip()[-500:]} It takes a connection to the Python "
            f"package index and Python 3.10 to 3.13. Try `{_INSTALL}` again when there is one."
        )
    return sorted(folder.glob("*.whl"))


def _unpack_wheels(wheels: list[Path], folder: Path) -> None:
    """Unpack the bindings and the libraries they need, and give both the names they look for."""
    wanted = (f"{BINDINGS}/", *(f"{_LIBRARIES}/{name}" for name in _LINKED))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.startswith(wanted) or "/licenses/" in member:
                    archive.extract(member, folder)
    for name in _LINKED:
        library = next((folder / _LIBRARIES).glob(f"{name}.*"))
        major = library.name.removeprefix(f"{name}.").split(".")[0]
        library.rename(folder / BINDINGS / f"{name}.{major}")
    (folder / PACKAGE).mkdir()
    (folder / PACKAGE / "__init__.py").write_text(_SHIM, encoding="utf-8")


def main(
    *,
    check: Annotated[bool, typer.Option(help="Only say whether it is installed.")] = False,
    as_json: cli.JsonOption = False,
) -> int:
    """Set up NVIDIA's parser and ahead-of-time compiler, so engines can be built without a GPU.

    Downloads two pinned wheels from the Python package index into the user's cache. NVIDIA's
    licence applies to them.
    """
    there = add_compiler_to_path()
    if not there and not check:
        print("Downloading NVIDIA's compiler (about 170 MB) ...", file=sys.stderr)
        install_compiler()
        there = add_compiler_to_path()
    if as_json:
        cli.print_json(
            {"installed": there, "version": COMPILER_VERSION, "home": f"{compiler_home()}"}
        )
    else:
        print(f"TensorRT-RTX {COMPILER_VERSION}: {compiler_home() if there else 'not installed'}")
    return 0 if there else 1


if __name__ == "__main__":
    cli.run(main, EXAMPLES)
