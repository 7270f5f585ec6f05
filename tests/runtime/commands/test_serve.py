"""The command `foveate serve`: what it prints, how it ends, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from engines.bundle import Bundle
from runtime.commands.serve import _listen
from runtime.server.options import Listening

ROOT = Path(__file__).parents[3]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "runtime.serve", *map(str, arguments)]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", **environment},
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_answers_and_ends_in_order(
    language_bundle: Bundle, number: signal.Signals
) -> None:
    with subprocess.Popen(
        command(language_bundle.root, "--port", 0, "--json", "--threads", 1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told["model"] == "tiny"
        with urlopen(f"{told['url']}/v1/health/ready", timeout=60) as response:
            assert json.load(response) == {"status": "ready"}
        process.send_signal(number)
        out, log = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert f"tiny answers at {told['url']}/v1 with 16 visual tokens" in log
    assert "GET /v1/health/ready 200" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "0.0.0.0"), "no key is set"),
        (("--allow-url", "http://x/"), "without http://"),
        (("--visual-tokens", "5"), "holds no vision graph with 5 visual tokens"),
        (("--role", "decoder"), "--role decoder: expected one of all, encoder"),
        (("--llm-url", "nowhere"), "is not the address of a server"),
        (("--host", "256.1.1.1", "--api-key", "x"), "cannot be listened on"),
    ],
)
def test_what_cannot_be_served_is_told(
    language_bundle: Bundle, arguments: tuple[str, ...], words: str
) -> None:
    done = run(language_bundle.root, "--port", 0, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


def test_a_port_that_is_taken_is_told(language_bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(language_bundle.root, "--port", taken.getsockname()[1])
    assert done.returncode == 2
    assert "Choose another --port" in done.stderr


def test_without_the_extra_it_says_which_one(language_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError('no', name='fastapi')")
    done = run(language_bundle.root, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 2
    assert "pip install 'foveate[serve]'" in done.stderr


def test_help_shows_an_example() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "python -m runtime.serve build/pocket" in done.stdout
    assert "--visual-tokens" in done.stdout


def test_pieces_of_an_answer_do_not_wait_for_acknowledgements() -> None:
    with (
        _listen(Listening(port=0)) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
