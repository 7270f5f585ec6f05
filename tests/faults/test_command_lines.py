"""No command line, nor what is typed into a command, ends in a traceback or in silence."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from engines.bundle import Bundle
from runtime.camera.loop import CameraLoop, CameraOptions
from runtime.camera.steering import lines_of, obey
from tests.faults.attack import run_attack
from tests.faults.scale import cases
from tests.runtime.camera.doubles import ShadeAnswerer, ShadeEncoder, numbered, source_of

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def places(
    language_bundle: Bundle, write_video: Callable[..., Path], tmp_path: Path
) -> dict[str, str]:
    """Where the words of a hostile command line are."""
    (tmp_path / "temp").mkdir()
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.new("RGB", (30, 20), (200, 30, 30)).save(folder / "picture.png")
    return {
        "VIDEO": str(write_video([20, 200, 90])),
        "PICTURE": str(folder / "picture.png"),
        "FOLDER": str(folder),
        "BUNDLE": str(language_bundle.root),
        "RECORD": str(tmp_path / "record"),
        "TEMP": str(tmp_path / "temp"),
    }


def test_hostile_command_lines_end_well(places: dict[str, str]) -> None:
    environment = {"FOVEATE_FAULT_PLACES": json.dumps(places), "TMPDIR": places["TEMP"]}
    tally = run_attack(
        "tests.faults.hostile_commands",
        "command",
        cases(600),
        seconds=90,
        memory_bytes=6_000_000_000,
        environment=environment,
    )
    print("command", tally)
    assert not tally.failures, "\n".join(tally.failures)


def run_command(
    name: str, *arguments: str | bytes, stdin: int = subprocess.DEVNULL, shell: str = ""
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"runtime.{name}", *arguments]
    if shell:
        command = ["/bin/sh", "-c", f'exec "$@" {shell}', "sh", *command]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=_ROOT,
        stdin=stdin,
        timeout=120,
        check=False,
        errors="replace",
    )


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("ask", ("BUNDLE", "PICTURE", b"caf\xe9?", "--json"), "is not UTF-8"),
        ("ask", ("BUNDLE", "PICTURE", "?", "--temperature", "nan"), "temperature is nan"),
        ("ask", ("BUNDLE", "/dev/zero", "?", "--json"), "not a regular file"),
        ("watch", ("BUNDLE", "VIDEO", "--ask", "?", "--metrics-port", "99999"), "65535"),
        ("watch", ("BUNDLE", "raw:100000x100000", "--ask", "?"), "at most"),
        ("watch", ("BUNDLE", "~nosuchuser/x.mp4", "--ask", "?"), "no such file or device"),
        ("watch", ("BUNDLE", b"caf\xe9.mp4", "--ask", "?"), "is not UTF-8"),
    ],
)
def test_mistakes_of_the_command_line_are_told(
    name: str, arguments: tuple[str | bytes, ...], words: str, places: dict[str, str]
) -> None:
    given = [places.get(word, word) if isinstance(word, str) else word for word in arguments]
    done = run_command(name, *given)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_coldest_temperature_is_answered(places: dict[str, str]) -> None:
    given = [places["BUNDLE"], places["PICTURE"], "?", "--temperature", "1e-320"]
    done = run_command("ask", *given, "--max-tokens", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answer_tokens"] in (1, 2)


@pytest.mark.parametrize("arguments", [("watch", "raw:4x4"), ("watch", "-"), ("chat", "PICTURE")])
def test_standard_input_may_be_closed(arguments: tuple[str, str], places: dict[str, str]) -> None:
    name, source = arguments
    extra = ["--ask", "?"] if name == "watch" else []
    given = [places["BUNDLE"], places.get(source, source), *extra]
    done = run_command(name, *given, shell="0<&-")
    assert done.returncode == 2, done.stderr
    assert "Standard input is closed" in done.stderr


def test_a_bad_byte_costs_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    loop = CameraLoop([source_of(numbered(1))], ShadeEncoder(), ShadeAnswerer(), CameraOptions("?"))
    long = b"ask " + b"x" * 200_000 + b"\n"
    typed = io.BytesIO(b"\xff\xfe\nask caf\xe9\n" + long + b"\x00\nask Who?\n")
    hearing = threading.Thread(target=obey, args=(lines_of(typed), loop))
    hearing.start()
    hearing.join(20)
    assert loop._question == "Who?"
    told = capsys.readouterr().err
    assert told.count("is not UTF-8") == 2
    assert told.count("longer than") == 1
    assert told.count("is not a command") == 1


def test_an_exception_in_a_command_is_told_and_the_next_is_heard(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Broken(CameraLoop):
        def pause(self) -> None:
            raise RuntimeError("nobody foresaw this")

    loop = Broken([source_of(numbered(1))], ShadeEncoder(), ShadeAnswerer(), CameraOptions("?"))
    obey(iter(["pause\n", "ask Who?\n"]), loop)
    assert loop._question == "Who?"
    assert "nobody foresaw this" in capsys.readouterr().err
