"""A robot's installation, without PyTorch and on Python 3.10 where there is one, answers.

It gets exactly `requirements-robot.txt` and the package, built from the source as a user would.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.bundle import Bundle
from runtime.commands.ask import ask

ROOT = Path(__file__).parents[1]
ABSENT = ("huggingface_hub", "onnx", "sympy", "torch", "transformers")


def oldest_python() -> str:
    """Return a Python 3.10 that has venv, else the one that runs the tests."""
    found = sorted(Path.home().glob(".pyenv/versions/3.10*/bin/python"))
    candidates = [*map(str, found), shutil.which("python3.10") or ""]
    for candidate in filter(None, candidates):
        probe = [candidate, "-c", "import sys, ensurepip; print(sys.version_info[:2])"]
        answered = subprocess.run(probe, capture_output=True, text=True, check=False)
        if answered.stdout.strip() == "(3, 10)":
            return candidate
    return sys.executable


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with what a robot installs; its Python."""
    place = tmp_path_factory.mktemp("bare")
    source = place / "source"
    source.mkdir()
    for name in ("engines", "runtime", "graphs", "calibration", "export", "foveate"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements-robot.txt"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([oldest_python(), "-m", "venv", "--without-pip", place / "env"], check=True)
    python = place / "env/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    pip += ["install", "--quiet", "--no-deps", "--no-compile"]
    for what in (["-r", "requirements-robot.txt"], ["."]):
        done = subprocess.run(
            [*pip, *what], cwd=source, capture_output=True, text=True, check=False
        )
        if "Failed to establish a new connection" in done.stderr:
            pytest.skip("the package index cannot be reached")
        assert done.returncode == 0, done.stderr
    return python


def test_torch_and_what_comes_with_it_are_absent(bare_python: Path) -> None:
    probe = f"import importlib.util as u; print([n for n in {ABSENT} if u.find_spec(n)])"
    found = subprocess.run(
        [bare_python, "-c", probe], capture_output=True, text=True, cwd="/", check=True
    )
    assert found.stdout.strip() == "[]"


def test_it_answers_as_the_full_installation_does(
    bare_python: Path, language_bundle: Bundle, tmp_path: Path
) -> None:
    photo, overlay = tmp_path / "photo.png", tmp_path / "kept.png"
    pixels = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    command = [bare_python, "-m", "runtime.ask", language_bundle.root, photo, "What is it?"]
    command += ["--json", "--max-tokens", "12", "--overlay", overlay]
    answered = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert answered.returncode == 0, answered.stderr
    said = json.loads(answered.stdout)
    assert said["visual_tokens"] == 16
    assert overlay.stat().st_size > 0
    here = ask(language_bundle.root, photo, "What is it?")
    assert here.text.startswith(said["answer"])


def test_it_answers_with_the_numpy_of_ros_humble(
    bare_python: Path, language_bundle: Bundle, tmp_path: Path
) -> None:
    """cv_bridge of ROS 2 Humble was built for NumPy 1, on the Python 3.10 of Ubuntu 22.04."""
    probe = [bare_python, "-c", "import sys; print(sys.version_info[:2] == (3, 10))"]
    if subprocess.run(probe, capture_output=True, text=True, check=True).stdout.strip() != "True":
        pytest.skip("there is no Python 3.10 here, and NumPy 1.26 has no wheel for this one")
    older = tmp_path / "older"
    pip = [sys.executable, "-m", "pip", "--python", str(bare_python), "install", "--quiet"]
    pip += ["--disable-pip-version-check", "--no-deps", "--no-compile", "--target", str(older)]
    done = subprocess.run(
        [*pip, "numpy==1.26.4"], capture_output=True, text=True, cwd="/", check=False
    )
    if "Failed to establish a new connection" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(photo)
    code = "import numpy, runpy; assert numpy.__version__ == '1.26.4'; "
    code += "runpy.run_module('runtime.ask', run_name='__main__')"
    command = [bare_python, "-c", code, language_bundle.root, photo, "What is it?", "--json"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(older)}
    answered = subprocess.run(
        [*command, "--max-tokens", "4"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert answered.returncode == 0, answered.stderr
    assert json.loads(answered.stdout)["visual_tokens"] == 16


def test_a_mistake_ends_as_it_does_everywhere(bare_python: Path, tmp_path: Path) -> None:
    command = [bare_python, "-m", "runtime.ask", tmp_path, "photo.png", "What is it?"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert "photo.png does not exist" in ended.stderr


def test_the_wheel_holds_the_live_page(bare_python: Path) -> None:
    (installed,) = bare_python.parents[1].glob("lib/python3*/site-packages/runtime/server/static")
    source = ROOT / "runtime" / "server" / "static"
    assert {file.name: file.read_bytes() for file in installed.iterdir()} == {
        file.name: file.read_bytes() for file in source.iterdir()
    }
    assert (installed / "index.html").is_file()
