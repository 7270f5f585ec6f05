"""What each package exports: lazily, completely, and never hidden by a module of the same name."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPORTED = {
    "engines": ["build_engines", "open_bundle", "open_session"],
    "runtime": ["VisionEncoder", "ask", "label", "open_bundle", "open_model", "watch"],
    "calibration": ["calibrate_bundle"],
    "export": [
        *("BuildOptions", "VerifyOptions", "build_bundle", "make_reducer", "verify_bundles"),
    ],
}
DOORS = {
    *("runtime.ask", "runtime.chat", "runtime.label", "runtime.serve", "runtime.triton"),
    "runtime.watch",
}
"""Modules for `python -m` alone: to import one would hide the function of the same name."""


@pytest.mark.parametrize("package", EXPORTED)
def test_a_package_exports_what_a_type_checker_sees(package: str) -> None:
    module = importlib.import_module(package)
    assert dir(module) == EXPORTED[package]
    tree = ast.parse((ROOT / package / "__init__.py").read_text("utf-8"))
    (choice,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in choice.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == EXPORTED[package]
    for name, place in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(str(place)), name)


@pytest.mark.parametrize("package", EXPORTED)
def test_no_module_has_the_name_of_an_export(package: str) -> None:
    modules = {f"{package}.{file.stem}" for file in (ROOT / package).iterdir()}
    assert {f"{package}.{name}" for name in EXPORTED[package]} & modules <= DOORS


def test_nothing_imports_the_doors() -> None:
    for file in ROOT.glob("**/*.py"):
        if {".venv", "build"} & set(file.relative_to(ROOT).parts[:1]):
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in DOORS, file
            elif isinstance(node, ast.Import):
                assert not DOORS & {alias.name for alias in node.names}, file


def test_a_name_that_is_not_there_is_told() -> None:
    with pytest.raises(ImportError, match="cannot import name 'aks' from 'runtime'"):
        exec("from runtime import aks")


def test_importing_a_package_imports_next_to_nothing() -> None:
    code = (
        f"import sys, {', '.join(EXPORTED)}; "
        "print([n for n in ('numpy', 'typer', 'torch', 'onnxruntime') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
