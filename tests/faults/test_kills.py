"""Commands killed at random moments, twice at once, and on disks that are full or read-only.

What a command writes is there as a whole, old or new, or not there; the next run leaves nothing of
the one that was killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.bundle import Bundle, open_bundle, write_bundle
from engines.errors import BundleError, FoveateError
from engines.staging import staged_file
from tests.faults.scale import FULL, cases
from tests.photographs import load_photographs
from tests.tiny_bundle import write_tiny_bundle

KILLS = 30
in_full = pytest.mark.skipif(not FULL, reason="takes minutes; run by `make test-faults`")
Command = list[str]


def start(command: Command) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )


def run(command: Command) -> float:
    """Run a command to its end and return its seconds."""
    started = time.perf_counter()
    process = start(command)
    _, said = process.communicate()
    assert process.returncode == 0, said.decode(errors="replace")[-2000:]
    return time.perf_counter() - started


def kill_often(command: Command, check: Callable[[], None], capsys: Any, name: str) -> None:
    """Kill the command at random moments after its start-up; check what is there each time."""
    run(command)
    check()
    idle = run([command[0], "--help"])
    whole = max(run(command), idle + 0.5)
    random, killed, count = Random(14), 0, cases(KILLS)
    for _ in range(count):
        process = start(command)
        time.sleep(random.uniform(idle * 0.8, whole))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        check()
    run(command)
    check()
    with capsys.disabled():
        print(f"\n{name}: {count} kills, {killed} before the end; old or new each time")


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four windows along the diagonal of a photograph."""
    folder = tmp_path_factory.mktemp("frames")
    photograph = load_photographs()["astronaut.png"]
    for number in range(24):
        at = number * 10
        Image.fromarray(photograph[at : at + 96, at : at + 96]).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def fp32_bundle(language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp32") / "bundle"
    run(build_command(language_checkpoint, out))
    return out


def build_command(checkpoint: Path, out: Path, *more: str) -> Command:
    command = ["export.build", "--model", str(checkpoint), "--out", str(out), "--tokens", "8"]
    return [*command, "--llm-precision", "fp32", "--overwrite", *more]


@in_full
def test_build(language_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "bundle"
    kill_often(build_command(language_checkpoint, out), lambda: _check_bundle(out), capsys, "build")
    assert names_in(tmp_path) == ["bundle"]


def _check_bundle(out: Path) -> None:
    assert open_bundle(out).manifest.vision


def test_build_where_nothing_was(language_checkpoint: Path, tmp_path: Path) -> None:
    """The first build of a place: there is a whole bundle, or none."""
    out = tmp_path / "bundle"
    process = start(build_command(language_checkpoint, out))
    while not any(".partial-" in name for name in names_in(tmp_path)):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not out.exists()
    run(build_command(language_checkpoint, out))
    _check_bundle(out)
    assert names_in(tmp_path) == ["bundle"]


def test_a_killed_build_takes_its_helper_with_it(language_checkpoint: Path, tmp_path: Path) -> None:
    """The model builder runs in a process of its own, and must not write on when nobody waits."""
    process = start(build_command(language_checkpoint, tmp_path / "bundle"))
    while not (helpers := _children(process.pid)):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    for _ in range(500):
        if not any(Path(f"/proc/{one}/stat").exists() for one in helpers):
            return
        time.sleep(0.02)
    pytest.fail(f"still running: {helpers}")


def _children(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task")
    try:
        return [
            int(one) for task in tasks.iterdir() for one in (task / "children").read_text().split()
        ]
    except OSError:
        return []


@in_full
def test_calibrate(fp32_bundle: Path, frames: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "int8"
    command = ["calibration.calibrate", str(fp32_bundle), "--frames", str(frames)]
    command += ["--out", str(out), "--gate", "overlap=0,cosine=0,worst=0,merged=0"]
    command += ["--overwrite"]
    kill_often(command, lambda: _check_bundle(out), capsys, "calibrate")
    assert names_in(tmp_path) == ["int8"]


@in_full
@pytest.mark.trt
def test_engine_build(language_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    from engines.trt.compiler_cache import add_compiler_to_path
    from engines.trt.plan import read_record

    if not add_compiler_to_path():
        pytest.skip("NVIDIA's compiler is not installed: python -m engines.install_trt_rtx")

    out = tmp_path / "bundle"
    run(build_command(language_checkpoint, out, "--target", "rtx-4090", "--precision", "fp16"))

    def check() -> None:
        bundle = open_bundle(out)
        for plan in bundle.local.glob("*.plan"):
            try:
                assert read_record(plan).plan_bytes == plan.stat().st_size
            except FoveateError as error:  # a plan whose record is not there yet is told
                assert "record" in str(error) or "sidecar" in str(error)

    kill_often(["engines.build", str(out), "--rebuild"], check, capsys, "engines.build")
    assert not [name for name in names_in(out / "local") if ".partial" in name]


@in_full
def test_record(language_bundle: Bundle, frames: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "recording"
    command = ["runtime.watch", str(language_bundle.root), str(frames), "--ask", "What is it?"]
    command += ["--record", str(folder), "--max-tokens", "3", "--every-frame"]

    def check() -> None:
        for name in names_in(folder):
            if ".partial-" in name:
                continue
            if name.endswith(".json"):
                json.loads((folder / name).read_text())
                assert (folder / f"{name.removesuffix('.json')}.jpg").is_file()
            else:
                np.asarray(Image.open(folder / name))

    kill_often(command, check, capsys, "record")
    assert not [name for name in names_in(folder) if ".partial" in name]


@in_full
def test_two_builders_at_once(language_checkpoint: Path, tmp_path: Path) -> None:
    """One writes; the other ends with a clear error, with --overwrite too."""
    out = tmp_path / "bundle"
    both = [start(build_command(language_checkpoint, out)) for _ in range(2)]
    said = [process.communicate()[1].decode() for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 2], [0, 0])  # the second may have begun when the first had ended
    for process, words in zip(both, said, strict=True):
        if process.returncode:
            assert "is being written by another process" in words
        assert "Traceback" not in words
    _check_bundle(out)
    assert names_in(tmp_path) == ["bundle"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs of 256 kB, as root; its options may be changed."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a disk takes root; RLIMIT_FSIZE stands in for it in test_bundle.py")

    def change(options: str) -> Path:
        subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)
        return place

    yield change
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_keeps_the_old_bundle(small_disk: Callable[[str], Path]) -> None:
    place = small_disk("rw")
    goal = write_tiny_bundle(place / "tiny")
    for size in (300_000, 1 << 20):
        with (
            pytest.raises(BundleError, match=r"No room to write .*tiny: .* is free on that disk"),
            write_bundle(goal, overwrite=True) as draft,
        ):
            draft.path("vision.onnx").write_bytes(bytes(size))
        assert names_in(place) == ["tiny"]
        assert open_bundle(goal).manifest.model == "tiny"
    with pytest.raises(FoveateError, match="No room"), staged_file(place / "frame.jpg") as staged:
        staged.write_bytes(bytes(1 << 20))
    assert names_in(place) == ["tiny"]


def test_a_disk_that_fills_at_any_point(small_disk: Callable[[str], Path]) -> None:
    """Whatever is the last thing that fits: old and whole, or new and whole."""
    place = small_disk("rw")
    goal = write_tiny_bundle(place / "tiny")
    filling = place / "filling"
    for kept in range(0, 40, 40 // cases(40)):
        filling.write_bytes(b"")
        free = os.statvfs(place)
        filling.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - kept * 1024)))
        try:
            write_tiny_bundle(goal, overwrite=True, model="second")
        except BundleError as error:
            assert "No room" in str(error)
        assert open_bundle(goal).manifest.model in ("tiny", "second")
        assert names_in(place) == ["filling", "tiny"]


def test_a_read_only_disk_is_told(small_disk: Callable[[str], Path]) -> None:
    place = small_disk("rw")
    goal = write_tiny_bundle(place / "tiny")
    small_disk("ro")
    with pytest.raises(BundleError, match="cannot be written"):
        write_tiny_bundle(goal, overwrite=True)
    with pytest.raises(FoveateError, match="cannot be written"), staged_file(place / "a.jpg"):
        pytest.fail("the block must not run")
    assert open_bundle(goal).manifest.model == "tiny"
