"""What was hashed before is not hashed again, unless it changed in any way."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from engines import digests
from engines.bundle import open_bundle
from engines.digests import NOTES_FILE, kept_digests_of
from engines.errors import BundleError
from tests.small_graph import write_small_bundle


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed; every size is worth noting, every file settled."""
    names: list[str] = []
    original = digests._sha256

    def counted(path: Path) -> str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(digests, "_sha256", counted)
    monkeypatch.setattr(digests, "WORTH_NOTING_BYTES", 1)
    monkeypatch.setattr(digests, "_SETTLED_NS", -1)
    return names


def write(root: Path) -> Path:
    root.mkdir()
    (root / "weights").write_bytes(b"1234")
    return root


def digest_of(content: bytes) -> dict[str, str]:
    return {"weights": hashlib.sha256(content).hexdigest()}


def test_a_file_is_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    root = write(tmp_path / "bundle")
    for _ in range(3):
        assert kept_digests_of(root, ["weights"], root / "local") == digest_of(b"1234")
    assert hashed == ["weights"]


def test_other_bytes_under_the_same_size_and_time_are_seen(
    tmp_path: Path, hashed: list[str]
) -> None:
    root = write(tmp_path / "bundle")
    kept_digests_of(root, ["weights"], root / "local")
    times = (root / "weights").stat()
    time.sleep(0.02)  # the file system's clock ticks every few milliseconds
    (root / "weights").write_bytes(b"4321")
    os.utime(root / "weights", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert kept_digests_of(root, ["weights"], root / "local") == digest_of(b"4321")


def test_a_copy_with_its_notes_is_hashed_again(tmp_path: Path, hashed: list[str]) -> None:
    root = write(tmp_path / "bundle")
    kept_digests_of(root, ["weights"], root / "local")
    copy = Path(shutil.copytree(root, tmp_path / "copy"))  # keeps the times, as `cp -a` does
    assert (copy / "local" / NOTES_FILE).is_file()
    kept_digests_of(copy, ["weights"], copy / "local")
    assert hashed == ["weights", "weights"]


@pytest.mark.parametrize("notes", ["", "[]", '{"weights": 1}', '{"weights": [[1, 2], "x"]}'])
def test_damaged_notes_count_for_nothing(tmp_path: Path, hashed: list[str], notes: str) -> None:
    root = write(tmp_path / "bundle")
    (root / "local").mkdir()
    (root / "local" / NOTES_FILE).write_text(notes)
    assert kept_digests_of(root, ["weights"], root / "local") == digest_of(b"1234")


def test_a_file_that_has_just_changed_is_not_noted(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED_NS", 60_000_000_000)
    root = write(tmp_path / "bundle")
    kept_digests_of(root, ["weights"], root / "local")
    assert not (root / "local").exists()


def test_a_changed_bundle_is_refused_after_it_was_opened(tmp_path: Path, hashed: list[str]) -> None:
    root = write_small_bundle(tmp_path / "bundle")
    open_bundle(root)
    open_bundle(root)
    assert hashed.count("vision.onnx") == 2, "written, and opened once"
    content = bytearray((root / "vision.onnx").read_bytes())
    content[-1] ^= 1
    time.sleep(0.02)
    (root / "vision.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"vision\.onnx was changed"):
        open_bundle(root)
