"""How a command ends: exit codes, and an error as one paragraph on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
from dataclasses import dataclass
from typing import Annotated
import typer
from engines import cli
from engines.errors import BundleError

@dataclass(frozen=True)
class Tone:
    \"\"\"What is heard; more about it.\"\"\"

    loud: Annotated[bool, typer.Option("--loud", help="Shout it.")] = False
    word: Annotated[str, typer.Option(help="What to say.")] = "hm"

def main(
    how: Annotated[str, typer.Argument(help="How to end.")],
    threads: cli.ThreadsOption = None,
    tone: Tone = Tone(word="yes"),
    api_key: Annotated[str, typer.Option(envvar="FOVEATE_API_KEY")] = "",
    as_json: cli.JsonOption = False,
) -> int | None:
    \"\"\"End in many ways.\"\"\"
    if how == "mistake":
        raise BundleError("x is y. Do z.")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "bug":
        raise ZeroDivisionError(repr(api_key) + " " + tone.word)
    if how == "check":
        return 1
    cli.print_json({"threads": threads, "loud": tone.loud, "word": tone.word})
    return None

cli.run(main, ["python -m end well"])
"""


def end(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_mistake_is_one_paragraph_and_exit_code_2(options: list[str]) -> None:
    ended = end("mistake", *options)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: x is y. Do z.\n"


def test_a_result_is_one_object_on_stdout() -> None:
    ended = end("well", "--threads", "2", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout) == {"threads": 2, "loud": False, "word": "yes"}


def test_the_fields_of_a_dataclass_are_options() -> None:
    ended = end("well", "--loud", "--word", "no")
    assert json.loads(ended.stdout) == {"threads": None, "loud": True, "word": "no"}


def test_exit_codes() -> None:
    assert end("check").returncode == 1
    assert end("interrupt").returncode == 130
    assert end("well", "--threads", "0").returncode == 2
    assert end().returncode == 2


def test_a_defect_is_one_paragraph_and_a_report_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("FOVEATE_API_KEY", "sk-from-the-environment")
    monkeypatch.setenv("OTHER_TOKEN", "abc")
    word = "sk-from-the-environment abc rtsp://me:mine@camera/live?token=17 abcd"
    ended = end("bug", "--word", word, "--api-key=sk-\n-line", "--json")
    assert (ended.returncode, ended.stdout) == (70, "")
    (report,) = tmp_path.iterdir()
    assert ended.stderr.startswith("internal error: ZeroDivisionError: '***' *** ***")
    assert ended.stderr.count("\n") == 1
    assert str(report) in ended.stderr
    told = report.read_text()
    assert "Traceback" in told
    assert "ZeroDivisionError" in told
    assert "abcd" in told
    for text in (told, ended.stderr):
        for secret in ("from-the-env", "abc ", "-line", "me:mine", "token=17"):
            assert secret not in text
    assert report.stat().st_mode & 0o077 == 0


def test_a_defect_is_told_where_no_report_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    ended = end("bug")
    assert ended.returncode == 70
    assert "Traceback" not in ended.stderr


def test_text_that_is_not_utf_8_is_refused() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, b"well", b"--word", b"caf\xe9"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "word is 'caf\\udce9', which is not UTF-8" in ended.stderr


def test_help_shows_the_examples() -> None:
    ended = end("--help")
    assert "End in many ways." in ended.stdout
    panel = ended.stdout.partition("What is heard ─")[2]
    assert "Shout it." in panel
    assert "--threads" not in panel
    assert "default: yes" in ended.stdout
    assert "python -m end well" in ended.stdout
