"""`runtime.watch` end to end: a real bundle, a real video file, a real bag."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from engines.bundle import Bundle
from engines.cli import make_app
from engines.errors import OptionError
from runtime.camera.budgets.goal_options import GoalOptions
from runtime.camera.loop import CameraOptions
from runtime.camera.view_options import ViewOptions
from runtime.commands.watch import WatchOptions, main, watch
from runtime.frames import SourceOptions, open_source
from runtime.language.generate import GenerationOptions
from runtime.model import open_model
from runtime.model_options import ModelOptions

SHADES = [20, 60, 100, 140, 180, 220]
QUESTION = "What is it?"


def lines_of(
    bundle: Bundle, source: Path, control: io.StringIO | None = None, **changes: Any
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    camera = {"question": QUESTION, "every_frame": True, "reuse": False}
    camera |= changes.pop("camera", {})
    options = WatchOptions(
        camera=CameraOptions(**camera),
        source=SourceOptions(**changes.pop("view", {})),
        generation=GenerationOptions(max_tokens=5),
        **changes,
    )
    watch(bundle.root, str(source), options, lines.append, control)
    return lines


def answers_one_by_one(bundle: Bundle, source: Path, **view: Any) -> list[str]:
    with open_model(bundle) as model, open_source(str(source), SourceOptions(**view)) as frames:
        options = GenerationOptions(max_tokens=5)
        return [model.ask(frame.image, QUESTION, options).text for frame in frames]


def test_a_video_file_is_answered_as_its_frames_are_one_by_one(
    write_video: Callable[..., Path], language_bundle: Bundle
) -> None:
    path = write_video(SHADES)
    lines = lines_of(language_bundle, path)
    answers, end = lines[:-1], lines[-1]
    assert [line["answer"] for line in answers] == answers_one_by_one(language_bundle, path)
    assert [line["timestamp_ns"] for line in answers] == [n * 100_000_000 for n in range(6)]
    assert [line["frame"] for line in answers] == list(range(6))
    assert end == {"event": "end", "frames": 6, "answers": 6, "drops": {}, "errors": {}}
    assert set(answers[0]["milliseconds"]) == {"preprocess", "encode", "prefill", "decode"}
    assert answers[0]["age_ms"] > 0
    assert answers[0]["visual_tokens"] > 0


def test_a_bag_is_answered_with_its_view(
    write_bag: Callable[..., Path],
    make_message: Callable[..., object],
    language_bundle: Bundle,
) -> None:
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (4, 24, 32, 3), dtype=np.uint8)
    path = write_bag(
        [("/front", n, make_message(image, "rgb8", 10**18 + n)) for n, image in enumerate(images)]
        + [("/rear", 9, make_message(images[0]))]
    )
    view = {"topic": "/front", "rotate": 90, "crop": (2, 2, 20, 16)}
    lines = lines_of(language_bundle, path, view=view)
    assert [line["answer"] for line in lines[:-1]] == answers_one_by_one(
        language_bundle, path, **view
    )
    assert [line["timestamp_ns"] for line in lines[:-1]] == [10**18 + n for n in range(4)]


def test_commands_change_the_question_and_end_the_loop(
    write_video: Callable[..., Path], language_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    control = io.StringIO("ask Is it dark?\njump\n")
    lines = lines_of(language_bundle, write_video(SHADES), control)
    assert {line["question"] for line in lines[1:-1]} == {"Is it dark?"}
    assert "'jump' is not a command" in capsys.readouterr().err
    stopped = lines_of(language_bundle, write_video(SHADES), io.StringIO("stop\n"))
    assert stopped[-1]["answers"] < 6


def test_answers_are_recorded(
    write_video: Callable[..., Path], language_bundle: Bundle, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    lines = lines_of(language_bundle, write_video(SHADES[:3]), record=kept, answers=2)
    assert lines[-1]["recorded"] == lines[-1]["answers"] == 2
    assert sorted(path.name for path in kept.iterdir()) == [
        f"0000000{number}.{suffix}"
        for number in (0, 1)
        for suffix in ("jpg", "json", "overlay.png")
    ]
    assert json.loads((kept / "00000001.json").read_text()) == lines[1]


def test_command_line(write_video: Callable[..., Path], language_bundle: Bundle) -> None:
    arguments = [str(language_bundle.root), str(write_video(SHADES)), "--ask", QUESTION]
    arguments += ["--every-frame", "--no-reuse", "--max-tokens", "2", "--fps", "5"]
    result = CliRunner().invoke(make_app(main), arguments)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["answer"] * 3 + ["end"]


def test_mistakes_end_with_2_and_a_sentence(language_bundle: Bundle) -> None:
    app = make_app(main)
    bundle = str(language_bundle.root)
    for extra, words in (
        (["nowhere.mp4", "--ask", "?"], "there is no such file or device"),
        (["x.mp4", "--ask", "?", "--rotate", "45"], "rotate is 45"),
        (["x.mp4", "--ask", " "], "question is empty"),
        (["x.mp4", "--ask", "?", "--crop", "1,2"], "expected x,y,width,height"),
    ):
        result = CliRunner().invoke(app, [bundle, *extra])
        assert result.exit_code == 2
        assert words in result.stderr


def test_several_sources_are_answered_by_name(
    write_video: Callable[..., Path], language_bundle: Bundle, tmp_path: Path
) -> None:
    """Each frame as if its source were alone; the recording keeps them apart."""
    left, right = write_video(SHADES[:3], "left.mp4"), write_video(SHADES[3:], "right.mp4")
    arguments = [str(language_bundle.root), str(left), str(right), "--ask", QUESTION]
    arguments += ["--every-frame", "--no-reuse", "--max-tokens", "5"]
    result = CliRunner().invoke(make_app(main), [*arguments, "--record", str(tmp_path / "kept")])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    for source in (left, right):
        said = [line["answer"] for line in lines if line.get("source") == str(source)]
        assert said == answers_one_by_one(language_bundle, source)
    end = lines[-1]
    assert (end["frames"], end["answers"], end["drops"]) == (6, 6, {})
    assert end["recorded"] + sum(end["not_recorded"].values()) == 6  # a slow disk costs some
    kept = {path.name for path in (tmp_path / "kept").glob("*.json")}
    assert len(kept) == end["recorded"]
    assert kept <= {f"{camera}-0000000{frame}.json" for camera in (0, 1) for frame in range(3)}


def test_standard_input_cannot_be_frames_and_commands(language_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="cannot hold raw:4x4 and commands"):
        main(
            language_bundle.root,
            ["raw:4x4"],
            ask="?",
            control=True,
            view=ViewOptions(),
            source=SourceOptions(),
            budget=GoalOptions(),
            model=ModelOptions(),
        )
