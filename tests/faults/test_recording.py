"""Whatever goes wrong while answers are recorded, the loop ends, and says what is not on disk."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from engines.bundle import Bundle
from engines.cli import make_app
from runtime.camera import recording as recording_module
from runtime.camera.loop import CameraLoop, CameraOptions
from runtime.camera.parts import CameraAnswer
from runtime.camera.recording import Recording
from runtime.commands.watch import main
from tests.faults.scale import cases
from tests.runtime.camera.doubles import ShadeAnswerer, ShadeEncoder, numbered, source_of

_LOOK = CameraOptions("shade?", reuse=False)
_UNFORESEEN = (ValueError("x"), RuntimeError("x"), TypeError("x"), MemoryError(), OSError(5, "I/O"))


def one_answer() -> CameraAnswer:
    loop = CameraLoop([source_of(numbered(1), live=False)], ShadeEncoder(), ShadeAnswerer(), _LOOK)
    (answer,) = loop.answers()
    assert isinstance(answer, CameraAnswer)
    return answer


def closing_ends(recording: Recording) -> None:
    closing = threading.Thread(target=recording.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive(), "close() hangs"


@pytest.mark.parametrize("error", _UNFORESEEN, ids=repr)
def test_an_exception_nobody_foresaw_does_not_hang_the_end(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language_bundle: Bundle
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(recording_module, "save_overlay", fail)
    recording = Recording(tmp_path, language_bundle)
    answer = one_answer()
    for _ in range(20):
        recording.keep(answer, {})
    closing_ends(recording)
    assert recording.written == 0
    assert recording.drops.total() == 20
    assert recording.failures >= 1
    assert not list(tmp_path.glob("*.json"))


def test_a_document_that_is_no_json_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language_bundle: Bundle
) -> None:
    monkeypatch.setattr(recording_module, "save_overlay", lambda path, *_: path.write_bytes(b"p"))
    recording = Recording(tmp_path, language_bundle)
    for document in ({"a": object()}, {"a": "\udcff"}, {"a": 1}):
        recording.keep(one_answer(), document)
    closing_ends(recording)
    assert (recording.written, recording.drops) == (1, {"not written": 2})


def test_a_disk_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language_bundle: Bundle
) -> None:
    hanging = threading.Event()
    monkeypatch.setattr(recording_module, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(recording_module, "save_overlay", lambda *_: hanging.wait(60))
    recording = Recording(tmp_path, language_bundle)
    answer = one_answer()
    for _ in range(3):
        recording.keep(answer, {})
    closing_ends(recording)
    hanging.set()
    closing_ends(recording)  # as `watch` does: a second time changes nothing
    assert recording.written == 0
    assert recording.drops == {"abandoned at the end": 3}
    assert recording.failures == 3


def test_the_summary_and_the_exit_code_say_what_was_not_recorded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    language_bundle: Bundle,
    write_video: Callable[..., Path],
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("tile cannot extend outside image")

    command = [str(language_bundle.root), str(write_video([20, 200])), "--ask", "?"]
    command += ["--every-frame", "--no-reuse", "--max-tokens", "2", "--record"]
    whole = CliRunner().invoke(make_app(main), [*command, str(tmp_path / "whole")])
    assert whole.exit_code == 0, whole.output
    monkeypatch.setattr(recording_module, "save_overlay", fail)
    lost = CliRunner().invoke(make_app(main), [*command, str(tmp_path / "lost")])
    assert lost.exit_code == 1, lost.output
    end: dict[str, Any] = json.loads(lost.stdout.splitlines()[-1])
    assert (end["answers"], end["recorded"], end["not_recorded"]) == (2, 0, {"not written": 2})


def test_a_kill_at_any_moment_leaves_no_half_written_answer(
    tmp_path: Path, language_bundle: Bundle, write_video: Callable[..., Path]
) -> None:
    """kill -9: where an answer's JSON is, its pictures are whole."""
    video = write_video([*range(20, 240, 4)] * 4)
    moments = random.Random(14)
    recorded = 0
    for number in range(cases(30)):
        kept = tmp_path / f"kept-{number}"
        command = [sys.executable, "-m", "runtime.watch", str(language_bundle.root), str(video)]
        command += ["--ask", "?", "--every-frame", "--no-reuse", "--max-tokens", "1"]
        process = subprocess.Popen(
            [*command, "--record", str(kept)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "answer"
        while process.poll() is None and not list(kept.glob("[0-9]*.json")):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in kept.glob("[0-9]*.json"):
            recorded += 1
            assert json.loads(path.read_text())["event"] == "answer"
            for suffix in (".jpg", ".overlay.png"):
                with Image.open(path.with_suffix(suffix)) as image:
                    image.load()
    assert recorded
