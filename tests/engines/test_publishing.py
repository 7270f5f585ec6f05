"""There is always a whole directory in its place, and one process at a time writes there."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from engines import publishing
from engines.bundle import open_bundle, write_bundle
from engines.errors import BundleError
from engines.manifest import Manifest
from engines.staging import staged_directory, staged_file
from tests.tiny_bundle import tiny_manifest, tiny_vision_graph, write_tiny_bundle


def in_a_process(work: object, *arguments: object) -> int:
    """Run a function in a process of its own; minus the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def names_beside(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def dies_while_writing(goal: Path) -> None:
    with write_bundle(goal, overwrite=True) as draft:
        draft.path("vision.onnx").write_text("half")
        die()


def test_a_dead_process_is_cleaned_up_after(tmp_path: Path) -> None:
    goal = tmp_path / "tiny"
    assert in_a_process(dies_while_writing, goal) == -signal.SIGKILL
    assert any(".partial-" in name for name in names_beside(goal))
    write_tiny_bundle(goal)
    assert names_beside(goal) == ["tiny"]


def test_what_only_looks_like_a_leftover_stays(tmp_path: Path) -> None:
    goal = tmp_path / "tiny"
    for name in ("tiny.partial-mine", "other.partial-abcdefgh"):
        (tmp_path / name).mkdir()
    (tmp_path / "tiny.partial-aaaaaaaa").symlink_to(tmp_path / "other.partial-abcdefgh")
    write_tiny_bundle(goal)
    assert len(names_beside(goal)) == 4


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_while_replacing_leaves_one_of_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    goal = write_tiny_bundle(tmp_path / "tiny")
    if not exchange:
        monkeypatch.setattr(publishing, "_exchanged", lambda one, other: False)

    def dies_after_a_rename(goal: Path, count: int) -> None:
        renames = 0

        def after(*arguments: object) -> None:
            nonlocal renames
            renames += 1
            if renames == count:
                die()

        plain_rename, plain_exchange = Path.rename, publishing._exchanged

        def rename(path: Path, target: Path) -> None:
            plain_rename(path, target)
            after()

        def exchanged(one: Path, other: Path) -> bool:
            done = plain_exchange(one, other)
            if done:
                after()
            return done

        Path.rename, publishing._exchanged = rename, exchanged  # type: ignore[method-assign,assignment]
        write_tiny_bundle(goal, overwrite=True, model="second")

    for count in (1, 2):
        ended = in_a_process(dies_after_a_rename, goal, count)
        assert ended == (0 if exchange and count == 2 else -signal.SIGKILL)
        assert open_bundle(goal).manifest.model in ("tiny", "second")
        write_tiny_bundle(goal, overwrite=True)
        assert names_beside(goal) == ["tiny"]


def test_a_bundle_set_aside_counts_as_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = write_tiny_bundle(tmp_path / "tiny")
    goal.rename(publishing._retired_path(goal))
    with pytest.raises(BundleError, match="already holds a bundle"):
        write_tiny_bundle(goal)
    assert open_bundle(goal).manifest.model == "tiny"
    assert names_beside(goal) == ["tiny"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    goal = tmp_path / "tiny"
    with write_bundle(goal) as draft:
        for overwrite in (False, True):
            with pytest.raises(BundleError, match="is being written by another process"):
                write_tiny_bundle(goal, overwrite=overwrite)
        write_tiny_bundle(tmp_path / "elsewhere")
        for name in ("embeddings.safetensors", "tokenizer.json", "decoder/model.onnx"):
            draft.path(name).write_text(name)
        draft.path("vision.onnx").write_bytes(tiny_vision_graph())
        draft.describe(Manifest.model_validate(tiny_manifest()))
    assert open_bundle(goal).manifest.model == "tiny"
    assert names_beside(goal) == ["elsewhere", "tiny"]


def test_what_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Another program, or a machine that does not see our lock, put a bundle there."""
    goal = tmp_path / "tiny"
    other = write_tiny_bundle(tmp_path / "other", model="first")
    with pytest.raises(BundleError, match="already holds a bundle"), write_bundle(goal) as draft:
        draft.describe(Manifest.model_validate(tiny_manifest()))
        for name in ("embeddings.safetensors", "tokenizer.json", "decoder/model.onnx"):
            draft.path(name).write_text(name)
        draft.path("vision.onnx").write_bytes(tiny_vision_graph())
        other.rename(goal)
    assert open_bundle(goal).manifest.model == "first"
    assert names_beside(goal) == ["tiny"]


def test_a_link_to_a_bundle_is_replaced_where_it_points_to(tmp_path: Path) -> None:
    real = write_tiny_bundle(tmp_path / "disk" / "tiny")
    (tmp_path / "link").symlink_to(real)
    write_tiny_bundle(tmp_path / "link", overwrite=True, model="second")
    assert open_bundle(real).manifest.model == "second"
    assert (tmp_path / "link").is_symlink()
    assert names_beside(real) == ["tiny"]


def test_staged_files_of_dead_processes_go(tmp_path: Path) -> None:
    def dies(file: Path) -> None:
        with staged_file(file) as staged:
            staged.write_text("half")
            die()

    assert in_a_process(dies, tmp_path / "00000001.jpg") == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1

    def goes_on(file: Path) -> None:
        with staged_file(file) as staged:
            staged.write_text("whole")

    assert in_a_process(goes_on, tmp_path / "00000002.jpg") == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["00000002.jpg"]


def test_staged_files_of_the_living_stay(tmp_path: Path) -> None:
    def other(file: Path) -> None:
        with staged_file(file) as staged:
            staged.write_text("whole")

    with staged_file(tmp_path / "one.json") as staged:
        staged.write_text("1")
        assert in_a_process(other, tmp_path / "two.json") == 0
    assert names_beside(tmp_path / "one.json") == ["one.json", "two.json"]


def test_a_directory_that_may_not_be_locked_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with staged_directory(tmp_path / "out") as staged:
        (staged / "file").write_text("")
    assert names_beside(tmp_path / "out") == ["out"]
    assert "cannot be locked" in caplog.text
