"""`runtime.label --ray` on a local Ray of two workers that are killed: run by `make test-ray`."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from engines.bundle import Bundle
from engines.cli import make_app
from engines.errors import BackendError, OptionError
from engines.secret import Secret
from runtime.commands.label import label, main
from runtime.labels import cluster
from runtime.labels.answers_file import AnswersFile
from runtime.labels.job import ClusterOptions, LabelOptions
from runtime.language.generate import GenerationOptions
from runtime.model_options import ModelOptions

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray", reason="Ray is not installed: run `make test-ray`")
pq = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parents[3]
QUESTION = "What is it?"
PARTS = LabelOptions(still=0, part_frames=2)
LONG = GenerationOptions(max_tokens=30)
AUTO = ClusterOptions(ray="local")


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # of the workers
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def videos(write_video: Callable[..., Path]) -> list[Path]:
    random = np.random.default_rng(0)
    return [
        write_video([int(shade) for shade in random.integers(0, 255, 40)], f"{name}.mp4")
        for name in ("one", "two", "three")
    ]


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return [{name: value for name, value in row.items() if name != "milliseconds"} for row in rows]


def busy_workers() -> list[psutil.Process]:
    """Ray's workers that are labelling now; all of them are descendants of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::_pieces" in "".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_worker_that_is_killed_loses_nothing_and_doubles_nothing(
    language_bundle: Bundle,
    videos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {
        "options": PARTS,
        "generation": LONG,
        "model": ModelOptions(threads=1),
    }
    alone, out = tmp_path / "alone.parquet", tmp_path / "answers.parquet"
    label(language_bundle.root, videos, QUESTION, alone, **options)
    killed: list[int] = []
    kept: list[str] = []
    keep = AnswersFile.keep

    def keep_and_kill(self: AnswersFile, recording: Any, part: Any) -> None:
        keep(self, recording, part)
        kept.append(f"{recording.key}-{part.number}")
        if len(kept) == 5:
            victim = busy_workers()[0]
            victim.send_signal(signal.SIGKILL)
            killed.append(victim.pid)

    monkeypatch.setattr(AnswersFile, "keep", keep_and_kill)
    summary = label(language_bundle.root, videos, QUESTION, out, cluster=AUTO, **options)
    assert len(killed) == 1
    assert rows_of(out) == rows_of(alone)
    assert summary["rows"] == 120
    assert [each["complete"] for each in summary["recordings"]] == [True] * 3
    assert len(kept) == len(set(kept)) == 60
    assert not out.with_name("answers.parquet.parts").exists()


def test_two_workers_work_at_once(
    language_bundle: Bundle, videos: list[Path], tmp_path: Path
) -> None:
    most, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.is_set():
            most = max(most, len(busy_workers()))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        label(
            language_bundle.root,
            videos,
            QUESTION,
            tmp_path / "answers.parquet",
            options=PARTS,
            generation=LONG,
            cluster=AUTO,
        )
    finally:
        stop.set()
        watcher.join()
    assert most == 2


def test_a_run_that_was_stopped_here_goes_on_there(
    language_bundle: Bundle, videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.parquet"
    keep = AnswersFile.keep
    kept: list[tuple[str, int]] = []

    def counted(self: AnswersFile, recording: Any, part: Any) -> None:
        keep(self, recording, part)
        kept.append((recording.key, part.number))
        if len(kept) == 25:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswersFile, "keep", counted)
    with pytest.raises(KeyboardInterrupt):
        label(language_bundle.root, videos, QUESTION, out, options=PARTS)
    label(language_bundle.root, videos, QUESTION, out, options=PARTS, cluster=AUTO)
    assert len(kept) == len(set(kept)) == 60
    assert len(rows_of(out)) == 120


def test_a_recording_that_kills_every_worker_is_given_up(
    language_bundle: Bundle, videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_pieces = cluster._pieces_of

    def deadly(bundle: str, options: Any, recording: Any, job: Any, done: Any) -> Iterator[Any]:
        for piece in label_pieces(bundle, options, recording, job, done):
            if recording.name.endswith("two.mp4") and getattr(piece, "number", 0) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield piece

    monkeypatch.setattr(cluster, "_pieces_of", deadly)
    out = tmp_path / "answers.parquet"
    arguments = [str(language_bundle.root), *map(str, videos), "--ask", QUESTION, "--out", str(out)]
    arguments += ["--still", "0", "--part-frames", "2", "--max-tokens", "3", "--ray", "local"]
    done = CliRunner().invoke(make_app(main), arguments)
    assert done.exit_code == 1, done.output
    assert "two.mp4: 3 x worker died. It was not read to its end." in done.stderr
    rows = rows_of(out)
    frames = {str(video): [] for video in videos}
    for row in rows:
        frames[row["recording"]].append(row["frame"])
    whole, cut = list(range(40)), list(range(6))
    assert list(frames.values()) == [whole, cut, whole]
    monkeypatch.undo()
    again = CliRunner().invoke(make_app(main), arguments)
    assert again.exit_code == 0, again.output
    assert len(rows_of(out)) == 120


def test_an_error_of_the_model_ends_the_run_in_words(
    language_bundle: Bundle, videos: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "answers.parquet"
    with pytest.raises(BackendError, match="positions"):
        label(
            language_bundle.root,
            videos,
            QUESTION,
            out,
            model=ModelOptions(context_length=8),
            cluster=AUTO,
        )
    assert not out.exists()


def test_a_key_is_not_sent_to_workers(
    language_bundle: Bundle, videos: list[Path], tmp_path: Path
) -> None:
    given = ModelOptions(llm_url="http://127.0.0.1:1/v1", api_key=Secret("s3cret-key"))
    with pytest.raises(OptionError, match="Set FOVEATE_API_KEY on every machine") as told:
        label(
            language_bundle.root,
            videos,
            QUESTION,
            tmp_path / "answers.parquet",
            model=given,
            cluster=AUTO,
        )
    assert "s3cret" not in str(told.value)
