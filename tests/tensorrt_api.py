"""The names and signatures of a TensorRT version, read from its bindings without its library.

The bindings of the package index import against any library that has the nine functions they link
to; here these do nothing. pybind11 writes every signature into a docstring, which is what is read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from engines.trt.compiler_cache import cache_root

PINNED = Path(__file__).parent / "engines" / "tensorrt_bindings.txt"
_STUBS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
}
_DUMP = """
import json, tensorrt_bindings as trt
names = {}
for name in dir(trt):
    item = getattr(trt, name)
    if isinstance(item, type):
        names[name] = {attr: getattr(item, attr).__doc__ or "" for attr in dir(item)}
    else:
        names[name] = item.__doc__ or ""
print(json.dumps({"version": trt.__version__, "names": names}))
"""


class UnavailableError(Exception):
    """The bindings cannot be had here, and why."""


@dataclass(frozen=True)
class Signature:
    """One way to call something, without `self`."""

    names: tuple[str, ...]
    required: int

    def takes(self, positional: int, keywords: tuple[str, ...]) -> bool:
        """Tell whether a call with so many arguments, and these by name, fits."""
        total = positional + len(keywords)
        return self.required <= total <= len(self.names) and set(keywords) <= set(
            self.names[positional:]
        )


@dataclass(frozen=True)
class Api:
    """What one version of the bindings offers."""

    version: str
    names: dict[str, str | dict[str, str]]

    def has(self, *path: str) -> bool:
        """Tell whether ``trt.a`` or ``trt.a.b`` exists."""
        item = self.names.get(path[0])
        if item is None or len(path) == 1:
            return item is not None
        return isinstance(item, dict) and path[1] in item

    def signatures(self, *path: str) -> list[Signature]:
        """Return every overload of ``trt.a.b`` (or of the constructor of ``trt.a``)."""
        item = self.names[path[0]]
        text = (
            item.get(path[1] if len(path) > 1 else "__init__", "")
            if isinstance(item, dict)
            else item
        )
        name = path[1] if len(path) > 1 else "__init__" if isinstance(item, dict) else path[0]
        found = []
        for line in text.splitlines():
            start = line.find(f"{name}(")
            if start in (0, 3) and not line.startswith(f"{name}(*args"):
                found.append(_parse_signature(line[start + len(name) :]))
        return found


def _parse_signature(text: str) -> Signature:
    """Parse "(self: X, a: int = 0) -> Y"; brackets may nest."""
    depth, part, parts = 0, "", []
    for letter in text:
        depth += letter in "([{<"
        depth -= letter in ")]}" or (letter == ">" and not part.endswith("-"))
        if depth == 0:
            break
        if letter == "," and depth == 1:
            parts.append(part)
            part = ""
        elif not (letter == "(" and depth == 1):
            part += letter
    arguments = [item.strip() for item in [*parts, part] if item.strip()]
    arguments = [item for item in arguments if not item.startswith("self")]
    return Signature(
        tuple(item.split(":")[0].strip() for item in arguments),
        sum(" = " not in item for item in arguments),
    )


def pinned_versions() -> dict[str, str]:
    """Return version -> its block of the pinned requirements."""
    blocks: dict[str, str] = {}
    for line in PINNED.read_text("utf-8").splitlines():
        if "==" in line:
            version = line.split("==")[1].split()[0]
            blocks[version] = line
        elif blocks and line.startswith(" "):
            blocks[version] += "\n" + line
    return blocks


def load_api(version: str) -> Api:
    """Download a version's bindings, once, and read them.

    Raises:
        UnavailableError: no network, no compiler, or no wheel for this Python.
    """
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    home = cache_root() / "tensorrt-bindings" / f"{version}-{python}"
    if not (home / "tensorrt_bindings").is_dir():
        _install(version, home)
    package = home / "tensorrt_bindings"
    environment = {**os.environ, "PYTHONPATH": str(home), "LD_LIBRARY_PATH": str(package)}
    done = subprocess.run(
        [sys.executable, "-c", _DUMP], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the bindings {version} do not import: {done.stderr[-800:]}")
    return Api(**json.loads(done.stdout))


def _install(version: str, home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    pinned = home / "pinned.txt"
    pinned.write_text(pinned_versions()[version] + "\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--dest", str(home), "--requirement", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UnavailableError(f"TensorRT {version} bindings: {' '.join(reason)[:300]}")
    wheel = next(home.glob("*.whl"))
    major = version.split(".", maxsplit=1)[0]
    staged = home / "staged"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(staged)
    for library, functions in _STUBS.items():
        source = staged / f"{library}.c"
        source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in functions))
        output = staged / "tensorrt_bindings" / f"lib{library}.so.{major}"
        compile_ = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{output.name}", "-o", str(output)]
        try:
            subprocess.run([*compile_, str(source)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UnavailableError(f"no C compiler for the stub library: {error}") from error
    (staged / "tensorrt_bindings").rename(home / "tensorrt_bindings")
