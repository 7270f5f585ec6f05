"""The container files and the service: what can be checked without their base images."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engines.bundle import Bundle
from runtime.commands.systemd import tell_systemd
from runtime.model import open_model
from tests.test_extras import EXTRAS, skip_where_an_index_is_away

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(DEPLOY.glob("*.Dockerfile"))
UNIT = DEPLOY / "foveate-watch.service"
INSTRUCTIONS = {"ARG", "FROM", "RUN", "ENV", "COPY", "VOLUME", "ENTRYPOINT", "CMD"}


def instructions(file: Path) -> list[tuple[str, str]]:
    """Each instruction and its arguments, comments left out and lines joined."""
    lines = [line for line in file.read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(word, rest) for word, rest in found]


def pip_lines(file: Path) -> list[list[str]]:
    """What each `pip install` of a file is given, its environment left out."""
    given = []
    for word, rest in instructions(file):
        if word == "RUN" and "pip install" in rest:
            given.append(shlex.split(rest.split("pip install", 1)[1]))
    return given


def test_there_is_a_file_for_each_system() -> None:
    names = [file.stem for file in FILES]
    assert names == ["jetpack-6.2", "jetpack-7.2", "x86-cuda"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_whole(file: Path) -> None:
    found = instructions(file)
    assert {word for word, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "ARG" and found[1] == ("FROM", "${BASE}")
    shell = shutil.which("sh")
    assert shell is not None
    for word, rest in found:
        if word == "RUN":
            subprocess.run([shell, "-n", "-c", rest], check=True)
        elif word == "COPY":
            assert (ROOT / rest.split()[0]).exists()
    assert ("ENTRYPOINT", '["foveate"]') in found
    assert f"deploy/{file.name}" in file.read_text(), "its own name is in the command to build it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_extras_and_versions_are_ours(file: Path) -> None:
    llama, ours = pip_lines(file)
    assert EXTRAS["llamacpp"][0] in llama
    extras = set(re.findall(r"\[([a-z,]+)\]", ours[-1])[0].split(","))
    assert extras <= set(EXTRAS)
    on_jetson = "jetpack" in file.name
    assert ("cuda" in extras) is not on_jetson and "cpu" not in extras


@pytest.mark.network
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_pip_is_told_can_be_installed(file: Path) -> None:
    """On x86-64 and this Python; llama.cpp is left out, which `make test-llamacpp` builds."""
    given = [word.replace("/src", str(ROOT)) for word in pip_lines(file)[1]]
    if sys.version_info[:2] > (3, 10):
        given = [word for word in given if word != "numpy<2"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run([*command, *given], cwd="/", capture_output=True, text=True, check=False)
    skip_where_an_index_is_away(done.stderr)
    assert done.returncode == 0, done.stderr[-2000:]


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not here")
    python = "/opt/foveate/bin/python"
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text("utf-8").replace(python, sys.executable), encoding="utf-8")
    done = subprocess.run([verify, "verify", unit], capture_output=True, text=True, check=False)
    if "Failed to initialize manager" in done.stderr:
        pytest.skip(f"systemd-analyze cannot run here: {done.stderr.strip()}")
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert done.returncode == 0 and not said, done.stderr


def test_the_unit_runs_a_command_that_exists() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text("utf-8"), re.MULTILINE)
    _, *arguments = shlex.split(line)
    given = [word for word in arguments if word.startswith("--")]
    command = [sys.executable, *arguments[:2], "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0
    assert given and all(word in done.stdout for word in given)


def test_systemd_is_told_that_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert tell_systemd("READY=1")
        assert manager.recv(64) == b"READY=1"
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not tell_systemd("READY=1")


def test_a_warm_up_runs_every_part(language_bundle: Bundle) -> None:
    with open_model(language_bundle, threads=1) as model:
        before = model.context.position
        assert model.warm_up(batch=2) > 0
        assert model.context.position > before == 0
