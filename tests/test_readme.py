"""The README tells the truth: its commands run as written, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def commands(starting_with: str) -> list[str]:
    """The README's shell lines that start with a word, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split("   #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(starting_with + " ")]


def test_make_targets_exist() -> None:
    for line in commands("make"):
        done = subprocess.run(
            [*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"


def run_python(arguments: list[str], place: Path) -> str:
    """What Python prints in a folder where the models of the project are."""
    if not (place / "models").exists():
        (place / "models").symlink_to(ROOT / "models")
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_commands_run_in_order_as_written(tmp_path: Path) -> None:
    lines = commands("python")
    assert lines
    for line in lines:
        run_python(shlex.split(line)[1:], tmp_path)


def test_the_lines_of_python_run_as_written(tmp_path: Path) -> None:
    """They stand beside the two commands, on the first screen, and give the demo's answer."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(block.splitlines()) <= 10
    assert README.index(block) < README.index("\n## ")
    assert run_python(["-c", block], tmp_path).startswith("four 64 {")


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)", README))
def test_links_lead_to_files(link: str) -> None:
    assert (ROOT / link).exists()
