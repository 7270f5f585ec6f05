"""Each extra can be installed: the package index is asked, and nothing is installed.

And what is there without any extra says which one is missing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engines import language_packages, ort
from engines.errors import EngineError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
COMPILED = {"llamacpp": "is built from source, in `make test-llamacpp`"}


def test_the_bare_package_brings_no_onnx_runtime() -> None:
    """It would overwrite the onnxruntime-gpu of a Jetson."""
    assert not [line for line in PROJECT["dependencies"] if line.startswith("onnxruntime")]
    with_it = {name for name, lines in EXTRAS.items() if "onnxruntime>=1.23" in lines}
    assert with_it == {"cpu", "export"}
    assert EXTRAS["cuda"] == ["onnxruntime-gpu[cuda,cudnn]>=1.23"]


def test_without_it_the_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"foveate\[cpu\].*foveate\[cuda\].*Jetson"):
        ort.create_inference_session("model.onnx")
    assert "foveate[cpu]" in language_packages.INSTALL["ort"]


def test_every_extra_that_is_told_of_exists() -> None:
    told: set[str] = set()
    for folder in ("engines", "runtime", "calibration", "export", "graphs", "foveate"):
        for file in (ROOT / folder).rglob("*.py"):
            for names in re.findall(r"foveate\[([a-z,]+)\]", file.read_text("utf-8")):
                told |= set(names.split(","))
    assert told <= set(EXTRAS) and {"cpu", "cuda", "tensorrt"} <= told


def skip_where_an_index_is_away(said: str) -> None:
    """Skip a test that pip could not do for want of a network."""
    if "Failed to establish a new connection" in said:
        pytest.skip("the package index cannot be reached")
    if "If https://pypi.nvidia.com/ is not reachable" in said:
        pytest.skip("TensorRT's wheel comes from pypi.nvidia.com, which cannot be reached")


@pytest.mark.network
@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - set(COMPILED)))
def test_an_extra_can_be_installed(extra: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--disable-pip-version-check", "--report", "-", *EXTRAS[extra]]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    skip_where_an_index_is_away(done.stderr)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    chosen = {item["metadata"]["name"].lower().replace("_", "-") for item in report["install"]}
    assert {re.match(r"[\w-]+", line)[0] for line in EXTRAS[extra]} <= chosen  # type: ignore[index]
