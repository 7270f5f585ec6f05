"""The chat command: lines in, answers out, commands obeyed, mistakes told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.bundle import Bundle
from engines.errors import OptionError, PictureError
from runtime.commands.chat import Chat
from runtime.conversation import Conversation
from runtime.language.generate import GenerationOptions
from runtime.model import Model, open_model

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(language_bundle: Bundle) -> Iterator[Model]:
    with open_model(language_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photos") / "a photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture
def chat(model: Model) -> Chat:
    return Chat(Conversation(model), GenerationOptions(max_tokens=4), quiet=False)


def command(lines: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runtime.chat", *map(str, arguments)],
        input=lines,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )


def test_lines_are_answered(chat: Chat, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.hear(f"/image {photo}")
    assert chat.hear("What is it?\n")
    assert chat.hear("   ")
    assert chat.hear("/tokens")
    told = capsys.readouterr()
    assert told.out == chat.answers[0][1].text + "\n"
    assert "of 1024 positions, 16 of them visual tokens" in told.err
    assert not chat.hear("/quit")


def test_commands(
    chat: Chat, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.hear(f"/image {photo}")
    chat.hear("What is it?")
    chat.hear(f"/frame {photo}")
    assert chat.conversation.exchanges == []
    chat.hear("What is it?")
    chat.hear(f"/save {tmp_path / 'talk.json'}")
    assert json.loads((tmp_path / "talk.json").read_text())["exchanges"][0]["question"]
    chat.hear("/reset")
    assert chat.conversation.images == ()
    chat.hear("/help")
    assert "/frame FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("/image", OptionError, "/image needs a file"),
        ("/image nowhere.png", PictureError, "nowhere.png does not exist"),
        ("/dance", OptionError, "no command /dance"),
        ("/save /nowhere/at/all/talk.json", OptionError, "cannot be written|No room|denied"),
    ],
)
def test_mistakes(chat: Chat, line: str, error: type[Exception], message: str) -> None:
    if line.startswith("/save") and os.geteuid() == 0:
        line = f"/save {ROOT}"
        message = "is a directory"
    with pytest.raises(error, match=message):
        chat.hear(line)


def test_dropped_exchanges_are_told(
    language_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_model(language_bundle, threads=1, context_length=120) as narrow:
        chat = Chat(Conversation(narrow), GenerationOptions(max_tokens=20), quiet=False)
        for _ in range(4):
            chat.hear("How many chairs are there?")
    assert "the context is full" in capsys.readouterr().err


def test_json_counts_what_each_question_cost(language_bundle: Bundle, photo: Path) -> None:
    done = command(
        "What is it?\nHow many?\n",
        language_bundle.root,
        photo,
        "--json",
        "--threads",
        1,
        "--max-tokens",
        4,
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["turns"]
    assert (first["question"], second["question"]) == ("What is it?", "How many?")
    assert first["visual_tokens"] == 16
    assert first["reused_tokens"] == 0
    assert second["reused_tokens"] >= first["prompt_tokens"]
    assert second["computed_tokens"] == second["prompt_tokens"] - second["reused_tokens"]


def test_a_mistake_in_a_pipe_ends_with_2(language_bundle: Bundle, photo: Path) -> None:
    done = command("/dance\n", language_bundle.root, photo)
    assert done.returncode == 2
    assert "There is no command /dance" in done.stderr
    assert "Traceback" not in done.stderr


def test_resume(language_bundle: Bundle, photo: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    options = ("--threads", 1, "--max-tokens", 4)
    done = command(f"What is it?\n/save {saved}\n", language_bundle.root, photo, *options)
    assert done.returncode == 0, done.stderr
    done = command("How many?\n", language_bundle.root, "--resume", saved, "--json", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["turns"][0]["prompt_tokens"] > 40
