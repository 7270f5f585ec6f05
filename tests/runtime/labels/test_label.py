"""`runtime.label`: its answers are those of `ask`, and none is lost or doubled whatever happens."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from engines.bundle import Bundle
from engines.cli import make_app
from engines.errors import OptionError
from engines.publishing import sole_writer
from runtime.commands.label import label, main
from runtime.frames import SourceOptions, open_source
from runtime.labels import labelling
from runtime.labels.job import LabelOptions
from runtime.language.generate import GenerationOptions
from runtime.language.grammar import Grammar
from runtime.model import Model, open_model

pq = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parents[3]
QUESTION = "What is it?"
SHORT = GenerationOptions(max_tokens=5)
ALL = LabelOptions(still=0, part_frames=2)
ALL_CHANGED = LabelOptions(part_frames=2)
Rows = list[dict[str, Any]]


def rows_of(out: Path) -> Rows:
    rows: Rows = pq.read_table(out).to_pylist()
    return rows


def without_times(rows: Rows) -> Rows:
    return [{name: value for name, value in row.items() if name != "milliseconds"} for row in rows]


def places(rows: Rows) -> list[tuple[str, int, str]]:
    return [(row["recording"], row["frame"], row["question"]) for row in rows]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures that differ, but for the second pair and the last three."""
    place = tmp_path / "pictures"
    place.mkdir()
    for at, shade in enumerate([20, 90, 90, 160, 230, 230, 231]):
        Image.fromarray(np.full((40, 60, 3), shade, np.uint8)).save(place / f"{at}.png")
    return place


def test_answers_are_those_of_ask(
    language_bundle: Bundle, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    video = write_video([20, 60, 100, 140, 180, 220, 255])
    out = tmp_path / "answers.parquet"
    questions = (QUESTION, "How many chairs?")
    summary = label(
        language_bundle.root,
        [video],
        questions,
        out,
        options=LabelOptions(every=2, still=0, part_frames=3),
        generation=SHORT,
    )
    rows = rows_of(out)
    with open_model(language_bundle) as model, open_source(str(video)) as source:
        frames = list(source)[::2]
        asked = [model.ask(frame.image, words, SHORT) for frame in frames for words in questions]
    assert [row["answer"] for row in rows] == [answer.text for answer in asked]
    assert [row["finish"] for row in rows] == [answer.finish for answer in asked]
    assert [row["answer_tokens"] for row in rows] == [len(answer.token_ids) for answer in asked]
    assert [row["prompt_tokens"] for row in rows] == [answer.prompt_tokens for answer in asked]
    assert places(rows) == [(str(video), at, words) for at in (0, 2, 4, 6) for words in questions]
    assert [row["timestamp_ns"] for row in rows[::2]] == [frame.timestamp_ns for frame in frames]
    assert {row["visual_tokens"] for row in rows} == {16}
    assert min(row["milliseconds"] for row in rows) > 0
    assert (summary["rows"], summary["asked"], summary["copied"]) == (8, 8, 0)
    assert summary["recordings"][0]["frames"] == 7
    assert not out.with_name("answers.parquet.parts").exists()


def test_a_still_scene_is_asked_about_once(
    language_bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.parquet"
    summary = label(language_bundle.root, [folder], QUESTION, out, generation=SHORT)
    rows = rows_of(out)
    assert [row["copied"] for row in rows] == [False, False, True, False, False, True, True]
    assert [row["answer"] for row in rows][1:3] == [rows[1]["answer"]] * 2
    assert [row["visual_tokens"] for row in rows] == [16, 16, 0, 16, 16, 0, 0]
    assert (summary["asked"], summary["copied"]) == (4, 3)
    label(
        language_bundle.root,
        [folder],
        QUESTION,
        tmp_path / "parts.parquet",
        options=LabelOptions(part_frames=2),
        generation=SHORT,
    )
    copied = [row["copied"] for row in rows_of(tmp_path / "parts.parquet")]
    assert copied == [False, False, False, False, False, True, False]  # each part begins anew


def test_a_bag_is_read_by_its_time(
    language_bundle: Bundle,
    write_bag: Callable[..., Path],
    make_message: Callable[..., object],
    tmp_path: Path,
) -> None:
    image = np.zeros((24, 32, 3), np.uint8)
    bag = write_bag(
        [("/front", n, make_message(image + n, stamp_ns=10**18 + n * 10**8)) for n in range(25)]
    )
    out = tmp_path / "answers.parquet"
    options = LabelOptions(every_seconds=1.0, still=0, topic="/front")
    label(language_bundle.root, [bag], QUESTION, out, options=options, generation=SHORT)
    rows = rows_of(out)
    assert [row["frame"] for row in rows] == [0, 10, 20]
    assert [row["timestamp_ns"] for row in rows] == [10**18 + n * 10**9 for n in range(3)]
    assert {row["source"] for row in rows} == {f"{bag}:/front"}


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runtime.label", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        **options,
    )


def test_a_killed_run_goes_on_where_it_stopped(
    language_bundle: Bundle, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    shades = [int(shade) for shade in np.random.default_rng(0).integers(0, 255, 60)]
    videos = [write_video(shades, name) for name in ("one.mp4", "two.mp4")]
    arguments = [language_bundle.root, *videos, "--ask", QUESTION, "--max-tokens", 20]
    arguments += ["--part-frames", 4, "--still", 0, "--json", "--threads", 1]
    whole = run(*arguments, "--out", tmp_path / "whole.parquet")
    assert whole.returncode == 0, whole.stderr
    out, parts = tmp_path / "answers.parquet", tmp_path / "answers.parquet.parts"
    command = [sys.executable, "-m", "runtime.label", *map(str, arguments), "--out", str(out)]
    kept: set[str] = set()
    for wanted in (2, 5):
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while len(list(parts.glob("*.parquet"))) < wanted and process.poll() is None:
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        before = {path.name: path.stat().st_mtime_ns for path in parts.glob("[0-9a-f]*.parquet")}
        assert kept <= before.keys()
        kept = before.keys() | kept
        assert not out.exists()
    done = run(*arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    assert places(rows) == [(str(video), at, QUESTION) for video in videos for at in range(60)]
    assert without_times(rows) == without_times(rows_of(tmp_path / "whole.parquet"))
    assert json.loads(done.stdout)["rows"] == 120
    assert not parts.exists()


def test_parts_that_exist_are_not_asked_again(
    language_bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.parquet"
    asked = 0
    answer_about = Model.answer_about

    def dying(self: Model, *arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 6:
            raise KeyboardInterrupt
        return answer_about(self, *arguments, **options)

    monkeypatch.setattr(Model, "answer_about", dying)
    with pytest.raises(KeyboardInterrupt):
        label(language_bundle.root, [folder], QUESTION, out, options=ALL, generation=SHORT)
    label(language_bundle.root, [folder], QUESTION, out, options=ALL, generation=SHORT)
    assert asked == 6 + 3  # the third part began with the fifth frame, and is done again
    assert [row["frame"] for row in rows_of(out)] == list(range(7))
    again = label(language_bundle.root, [folder], QUESTION, out, options=ALL, generation=SHORT)
    assert (asked, again["rows"]) == (9, 7)  # a run that is complete asks nothing


def damaged_bag(path: Path) -> Path:
    """Damage a page of a bag's database, so that it opens and fails in the middle."""
    (file,) = path.glob("*.db3")
    data = bytearray(file.read_bytes())
    start = 4096 * (len(data) * 6 // 10 // 4096)
    data[start : start + 4096] = b"\xff" * 4096
    file.write_bytes(data)
    return path


def test_a_recording_that_fails_does_not_stop_the_others(
    language_bundle: Bundle,
    folder: Path,
    write_bag: Callable[..., Path],
    make_message: Callable[..., object],
    write_video: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    messages = [("/c", n, make_message(noise, stamp_ns=10**18 + n)) for n in range(20)]
    bag = damaged_bag(write_bag(messages, "sqlite3"))
    (tmp_path / "empty.mp4").write_bytes(b"nothing")
    out = tmp_path / "answers.parquet"
    arguments = [str(language_bundle.root), str(bag), str(tmp_path / "empty.mp4"), str(folder)]
    arguments += ["--ask", QUESTION, "--max-tokens", "5", "--still", "0", "--part-frames", "2"]
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(make_app(main), [*arguments, "--out", "answers.parquet", "--json"])
    assert done.exit_code == 1, done.output
    summary = json.loads(done.stdout)
    cut, empty, whole = summary["recordings"]
    assert 0 < cut["rows"] < 20
    assert not cut["complete"]
    assert cut["problems"] == {"read failed": 1}
    assert cut["rows"] % 2 == 1  # its last part is short, and is done again below
    assert (empty["rows"], empty["complete"], empty["problems"]) == (0, False, {"not opened": 1})
    assert (whole["rows"], whole["complete"], whole["problems"]) == (7, True, {})
    assert "empty.mp4" in done.stderr
    assert "not read to its end" in done.stderr
    assert len(rows_of(out)) == cut["rows"] + 7 == summary["rows"]
    # What could be read is kept. The same command tries the others again and doubles nothing.
    repaired = rows_of(out)
    again = CliRunner().invoke(make_app(main), [*arguments, "--out", "answers.parquet", "--json"])
    assert again.exit_code == 1
    assert without_times(rows_of(out)) == without_times(repaired)
    write_video([20, 90, 160], "empty.mp4")  # the user has repaired it
    CliRunner().invoke(make_app(main), [*arguments, "--out", "answers.parquet", "--json"])
    assert len(rows_of(out)) == len(repaired) + 3


def test_a_picture_that_cannot_be_read_has_a_row_that_says_so(
    language_bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    (folder / "3.png").write_bytes(b"no picture")
    out = tmp_path / "answers.parquet"
    summary = label(language_bundle.root, [folder], QUESTION, out, options=ALL, generation=SHORT)
    rows = rows_of(out)
    assert [row["answer"] is None for row in rows] == [at == 3 for at in range(7)]
    assert "3.png" in rows[3]["error"]
    assert summary["failed"] == 1
    assert summary["recordings"][0]["problems"] == {"undecodable": 1}


def test_answers_of_another_run_are_not_replaced(
    language_bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.parquet"
    root = language_bundle.root
    label(root, [folder], QUESTION, out, options=ALL, generation=SHORT)
    with pytest.raises(OptionError, match="other questions were given"):
        label(root, [folder], "Who is it?", out, options=ALL, generation=SHORT)
    Image.new("RGB", (60, 40)).save(folder / "8.png")
    with pytest.raises(OptionError, match="the recordings' files were given"):
        label(root, [folder], QUESTION, out, options=ALL, generation=SHORT)
    label(root, [folder], QUESTION, out, options=ALL, generation=SHORT, overwrite=True)
    assert len(rows_of(out)) == 8
    out.write_text("mine")
    with pytest.raises(OptionError, match="holds no answers of `foveate label`"):
        label(root, [folder], QUESTION, out, options=ALL, generation=SHORT)
    assert out.read_text() == "mine"
    with sole_writer(out, OptionError), pytest.raises(OptionError, match="another process"):
        label(root, [folder], QUESTION, out, options=ALL, generation=SHORT, overwrite=True)


def test_a_stopped_run_of_other_settings_is_kept_until_it_is_overwritten(
    language_bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.parquet"
    root = language_bundle.root
    yes_no = GenerationOptions(max_tokens=5, grammar=Grammar(choices=("yes", "no")))
    with monkeypatch.context() as patched:
        patched.setattr(labelling, "block_means", lambda image: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            label(root, [folder], QUESTION, out, generation=SHORT)  # it leaves no answer
        patched.setattr(labelling, "block_means", lambda image: 1 // (230 - int(image[0, 0, 0])))
        patched.setattr(labelling, "largest_change", lambda *blocks: 255)
        with pytest.raises(ZeroDivisionError):
            label(root, [folder], QUESTION, out, options=ALL_CHANGED, generation=yes_no)
    with pytest.raises(OptionError, match="other generation were given"):
        label(root, [folder], QUESTION, out, options=ALL_CHANGED, generation=SHORT)
    # Settings survive the disk.
    label(root, [folder], QUESTION, out, options=ALL_CHANGED, generation=yes_no)
    assert {row["answer"] for row in rows_of(out)} <= {"yes", "no"}
    label(root, [folder], QUESTION, out, generation=SHORT, overwrite=True)


def test_a_run_that_dies_while_it_removes_its_parts_has_all_its_answers(
    language_bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.parquet"

    def die_half_way(place: Path) -> None:
        sorted(place.iterdir())[0].unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("runtime.labels.answers_file.shutil.rmtree", die_half_way)
        label(language_bundle.root, [folder], QUESTION, out, options=ALL, generation=SHORT)
    again = label(language_bundle.root, [folder], QUESTION, out, options=ALL, generation=SHORT)
    assert again["rows"] == len(rows_of(out)) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.parquet", "pictures"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"every": 2, "every_seconds": 1.0}, "Give one of them"),
        ({"every_seconds": 0.0}, "expected more than 0"),
        ({"still": -1.0}, "expected 0 or more grey levels"),
        ({"part_frames": 0}, "part_frames is 0"),
        ({"rotate": 45}, "rotate is 45"),
    ],
)
def test_options_that_cannot_be_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        LabelOptions(**changes)


@pytest.mark.parametrize(
    ("recordings", "questions", "told"),
    [
        (["nowhere.mcap"], QUESTION, "nowhere.mcap: expected the file or folder"),
        (["pictures", "pictures/"], QUESTION, "Give each recording once"),
        (["pictures"], " ", "A question is empty"),
        (["pictures"], [QUESTION, QUESTION], "given twice"),
    ],
)
def test_what_cannot_be_labelled_is_told_at_once(
    recordings: list[str],
    questions: list[str],
    told: str,
    folder: Path,
    language_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=told):
        label(language_bundle.root, recordings, questions, "answers.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_a_place_that_cannot_be_written_is_told(language_bundle: Bundle, folder: Path) -> None:
    with pytest.raises(OptionError, match="cannot be written"):
        label(language_bundle.root, [folder], QUESTION, "/proc/answers.parquet")


def test_frames_are_numbered_whatever_is_left_out(
    write_video: Callable[..., Path],
) -> None:
    with open_source(str(write_video([10, 90, 170, 250])), SourceOptions(fps=5)) as source:
        frames = list(source.undecoded())
    assert [(frame.index, frame.timestamp_ns) for frame in frames] == [(0, 0), (2, 200_000_000)]


def test_a_recording_says_about_how_long_it_is(
    write_video: Callable[..., Path],
    write_bag: Callable[..., Path],
    make_message: Callable[..., object],
    folder: Path,
) -> None:
    image = make_message(np.zeros((24, 32, 3), np.uint8))
    mp4 = write_video([10, 90, 170, 250])
    mkv = write_video([10, 90, 170, 250], "clip.mkv")  # which holds no number of frames
    bag = write_bag([("/camera", n, image) for n in range(5)])
    lengths = []
    for recording in (mp4, mkv, bag, folder):
        with open_source(str(recording)) as source:
            lengths.append(source.length)
    assert lengths == [4, 4, 5, 7]
