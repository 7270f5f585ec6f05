"""Compute the SHA-256 of a bundle's files, large ones once for each change.

What took long is noted in the bundle's `local/`, under the file's size, inode and the times of its
last write and last change. A file that was replaced, edited or copied differs in one of these
(nobody can set the time of the last change), so it is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from engines.errors import BundleError, FoveateError
from engines.staging import staged_file

NOTES_FILE = "digests.json"
WORTH_NOTING_BYTES = 64 << 20
"""Smaller files are hashed each time, which takes less than a tenth of a second."""
_SETTLED_NS = 2_000_000_000
"""A file that changed so lately could change again without its times showing it."""
_CHUNK_BYTES = 4 << 20

_State = tuple[int, int, int, int]
"""Size, inode, last written, last changed."""


def digests_of(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each file; hashing releases the GIL, so threads share the work.

    Raises:
        BundleError: a file cannot be read.
    """
    names = list(names)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        try:
            return dict(zip(names, pool.map(lambda name: _sha256(root / name), names), strict=True))
        except OSError as error:
            raise BundleError(f"{root}: a file cannot be read: {error}.") from error


def kept_digests_of(root: Path, names: Iterable[str], notes: Path) -> dict[str, str]:
    """Return the SHA-256 of each file, from the notes where the file is as it was.

    Args:
        root: the bundle's directory.
        names: files of the bundle.
        notes: a directory of this machine for what it notes.

    Raises:
        BundleError: a file cannot be read.
    """
    names = list(names)
    begun_ns = time.time_ns()
    try:
        states = {name: _state(root / name) for name in names}
    except OSError as error:
        raise BundleError(f"{root}: a file cannot be read: {error}.") from error
    noted = _read(notes / NOTES_FILE)
    known = {n: noted[n][1] for n in names if n in noted and noted[n][0] == states[n]}
    digests = known | digests_of(root, [name for name in names if name not in known])
    fresh = {
        name: (state, digests[name])
        for name, state in states.items()
        if state[0] >= WORTH_NOTING_BYTES and begun_ns - max(state[2:]) > _SETTLED_NS
    }
    if fresh and fresh != noted:
        _write(notes / NOTES_FILE, fresh)
    return digests


def _state(file: Path) -> _State:
    found = file.stat()
    return found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _read(file: Path) -> dict[str, tuple[_State, str]]:
    """Return what was noted; nothing where the notes are missing or damaged."""
    try:
        found = json.loads(file.read_text("utf-8"))
        return {
            name: ((int(size), int(inode), int(written), int(changed)), str(digest))
            for name, ((size, inode, written, changed), digest) in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(file: Path, noted: dict[str, tuple[_State, str]]) -> None:
    # A bundle that may only be read is hashed each time.
    with suppress(FoveateError), staged_file(file) as staged:
        staged.write_text(json.dumps(noted, indent=1), "utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
