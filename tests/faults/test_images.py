"""No picture file stops what reads it, or takes more memory and time than a large one."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest

from engines.errors import PictureError, SourceError
from runtime.frames import open_source
from runtime.vision.pictures import load_picture
from tests.faults.attack import run_attack
from tests.faults.hostile_pictures import ENORMOUS
from tests.faults.scale import cases

_MODULE = "tests.faults.hostile_pictures"


def test_damaged_pictures_are_pictures_or_refused() -> None:
    tally = run_attack(_MODULE, "picture", cases(1500))
    print(tally)
    assert not tally.failures, tally.failures
    assert tally.outcomes["taken"]
    assert tally.outcomes["refused"]


def test_enormous_pictures_take_bounded_memory() -> None:
    """A megabyte that unpacks to gigabytes; the largest that is read takes less than 1.2 GB."""
    tally = run_attack(_MODULE, "enormous", ENORMOUS)
    print(tally)
    assert not tally.failures, tally.failures
    assert tally.outcomes["taken"] == 3
    assert tally.peak_bytes < 1_200_000_000


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    tally = run_attack(_MODULE, "scans", 2)
    assert not tally.failures, tally.failures
    assert tally.outcomes == {"refused": 2}


@pytest.mark.parametrize("opened", [load_picture, lambda path: open_source(str(path))])
def test_pipes_sockets_and_devices_are_refused_at_once(opened: object) -> None:
    with tempfile.TemporaryDirectory() as name:  # a short path, for the socket
        folder = Path(name)
        os.mkfifo(folder / "pipe.jpg")
        os.mkfifo(folder / "pipe.mp4")
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(str(folder / "door.png"))
            for path in (
                folder / "pipe.jpg",
                folder / "pipe.mp4",
                folder / "door.png",
                Path("/dev/zero"),
            ):
                with pytest.raises((PictureError, SourceError)):
                    opened(path)  # type: ignore[operator]
        with pytest.raises((PictureError, SourceError)):
            opened(folder)  # type: ignore[operator]


def test_a_file_of_too_many_bytes_is_refused_unread(tmp_path: Path) -> None:
    sparse = tmp_path / "large.png"
    with sparse.open("wb") as file:
        file.truncate(300_000_000)
    with pytest.raises(PictureError, match=r"300,000,000 bytes, expected at most 256,000,000"):
        load_picture(sparse)
