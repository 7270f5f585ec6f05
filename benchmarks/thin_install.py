"""How much a robot installs and how long the runtime takes to import.

    python -m benchmarks.thin_install [--python python3.10] [--json]

Two fresh environments: `requirements-robot.txt`, which is what the README's figure is about, and a
plain `pip install .[cpu]` with all that its dependencies ask for. Sizes are bytes of files below
site-packages, after the first import (so with the bytecode it wrote; the environments have no pip).
Imports are timed in processes of their own, bytecode and file cache warm, by the clock and by the
processor's time, which other work on the machine does not change.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from engines import cli

ROOT = Path(__file__).parents[1]
WAYS = {
    "robot": [
        ["--no-deps", "--no-compile", "-r", "requirements-robot.txt"],
        ["--no-deps", "--no-compile", "."],
    ],
    "plain": [["-c", "constraints.txt", ".[cpu]"]],
}
REPEATS = 7


def install(way: str, python: str, place: Path) -> Path:
    """Install the package one of the `WAYS` into a fresh environment and return its Python."""
    subprocess.run([python, "-m", "venv", "--without-pip", place], check=True)
    bare = place / "bin/python"
    source = place / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "tests", "models")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--python", str(bare), "--disable-pip-version-check"]
    for arguments in WAYS[way]:
        subprocess.run([*pip, "install", "--quiet", *arguments], cwd=source, check=True)
    return bare


def import_seconds(python: Path) -> tuple[float, float]:
    """Return the median time of `from runtime import ask`, by the clock and of the processor.

    The first of `REPEATS` + 1 processes writes the bytecode and is not counted.
    """
    probe = (
        "import time; t, c = time.perf_counter(), time.process_time(); from runtime import ask; "
        "print(time.perf_counter() - t, time.process_time() - c)"
    )
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    found = []
    for _ in range(REPEATS + 1):
        ended = subprocess.run(
            [python, "-c", probe],
            capture_output=True,
            text=True,
            cwd="/",
            env=environment,
            check=True,
        )
        found.append([float(number) for number in ended.stdout.split()])
    wall, processor = zip(*found[1:], strict=True)
    return statistics.median(wall), statistics.median(processor)


def installed_bytes(place: Path) -> int:
    """Return the size of every file below site-packages."""
    (packages,) = place.glob("lib/python3*/site-packages")
    return sum(file.stat().st_size for file in packages.rglob("*") if file.is_file())


def measure(way: str, python: str) -> dict[str, Any]:
    """Install one way and measure it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "env"
        started = time.perf_counter()
        bare = install(way, python, place)
        install_s = time.perf_counter() - started
        wall_s, processor_s = import_seconds(bare)
        version = subprocess.run([bare, "-V"], capture_output=True, text=True, check=True)
        return {
            "way": way,
            "python": version.stdout.split()[-1],
            "installed_mb": round(installed_bytes(place) / 1e6, 1),
            "import_s": round(wall_s, 3),
            "import_processor_s": round(processor_s, 3),
            "install_s": round(install_s, 1),
        }


def main(
    python: Annotated[
        str, typer.Option(help="The Python to install for, such as python3.10.")
    ] = sys.executable,
    as_json: cli.JsonOption = False,
) -> None:
    """Measure what the runtime weighs and how fast it starts, on a machine at rest."""
    results = [measure(way, python) for way in WAYS]
    if as_json:
        cli.print_json({"results": results})
        return
    for result in results:
        print(
            f"{result['way']:6} Python {result['python']:8} {result['installed_mb']:6.1f} MB   "
            f"from runtime import ask {result['import_s']:.3f} s "
            f"(processor {result['import_processor_s']:.3f} s)"
        )


if __name__ == "__main__":
    cli.run(main, ["python -m benchmarks.thin_install --python python3.10"])
