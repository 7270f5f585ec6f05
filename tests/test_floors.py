"""The five floors: a floor imports only floors below it, and only the packages it is allowed.

Read from the source, so an import inside a function counts as much as one at the top.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("engines", "runtime", "graphs", "calibration", "export", "foveate")  # lowest first
OUTSIDE = {"tests", "benchmarks", "examples", "models"}

# What a robot installs. Optional packages (a video library, another engine) are imported where
# they are used and come with an extra of pyproject.toml.
THIN = {"jinja2", "numpy", "onnxruntime", "PIL", "pydantic", "safetensors", "tokenizers", "typer"}
THIN |= {"rich", "tomli", "pydantic_core"}  # the last with pydantic
OPTIONAL = {
    "engines": {"openvino", "polygraphy", "tensorrt"},
    "runtime": {
        "av", "fastapi", "gguf", "jsonschema_rs", "llama_cpp", "llguidance", "openvino",
        "prometheus_client", "pyarrow", "ray", "rosbags", "starlette", "uvicorn",
    },
}  # fmt: skip
ALLOWED = {
    "engines": THIN | OPTIONAL["engines"],
    "runtime": THIN | OPTIONAL["runtime"],
    "graphs": THIN | {"onnx", "onnx_ir"},
    "calibration": THIN | {"onnx", "onnx_ir"},
    "foveate": {"typer"},
}
ONLY_IN = {
    "runtime/ros_node.py": {"rclpy", "sensor_msgs", "std_msgs"},  # they come with ROS
    "runtime/model_repository/picture_model.py": {"triton_python_backend_utils"},  # with Triton
    "runtime/model_repository/vision_model.py": {"triton_python_backend_utils"},
}


def imported_packages(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and top-level name of everything a module imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call) and _is_import_call(node):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value.split(".")[0]


def _is_import_call(node: ast.Call) -> bool:
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return name in {"import_module", "__import__"}


def breaches(path: str, source: str) -> list[str]:
    """Return what a module of a floor may not import, one line each."""
    floor = path.split("/", maxsplit=1)[0]
    above = set(FLOORS[FLOORS.index(floor) + 1 :]) | OUTSIDE
    allowed = ALLOWED.get(floor)
    if allowed is not None:
        allowed = allowed | ONLY_IN.get(path, set())
    found = []
    for line, package in imported_packages(source):
        if package in above:
            found.append(f"{path}:{line} imports {package}, which lies above {floor}")
        elif package in FLOORS or package in sys.stdlib_module_names or allowed is None:
            continue
        elif package not in allowed:
            found.append(f"{path}:{line} imports {package}, which {floor} may not use")
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_what_lies_below(floor: str) -> None:
    found = []
    for file in sorted((ROOT / floor).rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        found += breaches(path, file.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_the_command_imports_no_floor_but_the_lowest_by_itself() -> None:
    """It imports a command's module when it is asked for; see `foveate.__main__._load`."""
    for file in (ROOT / "foveate").rglob("*.py"):
        imported = {package for _, package in imported_packages(file.read_text("utf-8"))}
        assert imported & set(FLOORS) <= {"engines"}


def read_sources() -> dict[str, str]:
    """Return the source of every module of the floors, by its dotted name."""
    sources = {}
    for floor in FLOORS:
        for file in (ROOT / floor).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            sources[name] = file.read_text(encoding="utf-8")
    return sources


def imports_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return the modules that each module imports; one a type checker alone sees counts.

    `from package import module` imports the module, and nothing that the package exports.
    """
    return {
        name: {
            module if (module := f"{node.module}.{alias.name}") in sources else node.module
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        & sources.keys() - {name}
        for name, source in sources.items()
    }


def circle_of(imported: dict[str, set[str]]) -> list[str]:
    """Return names that import each other in a circle, or nothing."""
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def rooms_of(package: str, imported: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return what the modules and sub-packages right inside a package import of each other."""
    depth = package.count(".") + 2

    def room(name: str) -> str:
        return ".".join(name.split(".")[:depth])

    rooms: dict[str, set[str]] = {}
    for name, modules in imported.items():
        if name.startswith(f"{package}."):
            inside = {room(module) for module in modules if module.startswith(f"{package}.")}
            rooms.setdefault(room(name), set()).update(inside - {room(name)})
    return rooms


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    assert circle_of(imports_of(read_sources())) == []
    lazy = {"a.b": "def f():\n    from a import c", "a.c": "from a.b import f"}
    assert set(circle_of(imports_of(lazy))) == {"a.b", "a.c"}


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    imported = imports_of(read_sources())
    packages = {name.rpartition(".")[0] for name in imported} - {""}
    circles = {package: circle_of(rooms_of(package, imported)) for package in packages}
    assert {package: circle for package, circle in circles.items() if circle} == {}
    rooms = {"a.b.x": "from a.c.y import f", "a.b.z": "", "a.c.y": "", "a.c.w": "from a.b import z"}
    assert circle_of(imports_of(rooms)) == []  # no module of it is in a circle
    assert set(circle_of(rooms_of("a", imports_of(rooms | {"a.b": ""})))) == {"a.b", "a.c"}


def test_a_breach_is_seen() -> None:
    source = (
        "import os, torch\nfrom export.build import x\n"
        "def f():\n    import transformers.models\n    importlib.import_module('onnx.helper')\n"
    )
    assert breaches("runtime/ask.py", source) == [
        "runtime/ask.py:1 imports torch, which runtime may not use",
        "runtime/ask.py:2 imports export, which lies above runtime",
        "runtime/ask.py:4 imports transformers, which runtime may not use",
        "runtime/ask.py:5 imports onnx, which runtime may not use",
    ]
    assert breaches("engines/x.py", "import runtime, tests") == [
        "engines/x.py:1 imports runtime, which lies above engines",
        "engines/x.py:1 imports tests, which lies above engines",
    ]
    assert not breaches("calibration/scales/apply.py", "import onnx_ir, engines, runtime, onnx")
    assert not breaches("export/build/command.py", "import torch, calibration")


def test_thin_dependencies_are_what_the_thin_floors_import() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    required = {line.split(">")[0].split(";")[0].strip() for line in lines}
    names = {"pillow": "PIL"}
    assert {names.get(name, name) for name in required} | {"rich", "pydantic_core"} == THIN
    pinned = (ROOT / "requirements-robot.txt").read_text().splitlines()
    robot = {line.split("==")[0].lower() for line in pinned if not line.startswith("#")}
    assert required <= robot
    assert set(pinned) - set((ROOT / "constraints.txt").read_text().splitlines()) == {
        line for line in pinned if line.startswith("#")
    }
