"""Put a finished directory in the place of an old one, so that there is always one of them.

Enters: a directory that is complete and the place it belongs to. Leaves: the place holding the new
one. Linux exchanges two directories in one step; where it does not, the old one is set aside for a
moment, and whoever looks next brings it back should the process have died in between. One process
at a time may write to a place: it holds a lock beside it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.errors import FoveateError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}

_log = logging.getLogger(__name__)


def partial_prefix(destination: Path) -> str:
    """Return how the names of unfinished directories beside ``destination`` begin."""
    return f"{destination.name}.partial-"


@contextmanager
def sole_writer(destination: Path, error: type[FoveateError]) -> Iterator[None]:
    """Hold the lock of a place, clean what dead processes left there, and let go at the end.

    Args:
        destination: the directory that is to be written.
        error: what to raise when another process writes to it.

    Raises:
        FoveateError: of kind ``error``; another process is writing there.
    """
    lock = _lock_path(destination)
    handle = _locked(lock)
    if handle is None:
        raise error(
            f"{destination} is being written by another process, which holds the lock {lock}. Wait "
            "until it has ended, or choose another place to write to."
        )
    try:
        _restore(destination)
        _remove_leftovers(destination)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _lock_path(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.lock")


def _retired_path(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.retired")


def _locked(lock: Path) -> int | None:
    """Open and lock a file; None where another process (or thread) has it."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as refusal:
            if refusal.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            _log.warning("%s cannot be locked (%s): do not write there twice.", lock, refusal)
            return handle
        # Whoever held it before may have removed the file in between: then it guards nothing.
        if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
            return handle
        os.close(handle)


def _remove_leftovers(destination: Path) -> None:
    """Remove unfinished directories: with the lock held, whoever made them is dead."""
    pattern = re.compile(re.escape(partial_prefix(destination)) + r"[a-z0-9_]{8}(\.old)?")
    for entry in list(destination.parent.iterdir()):
        if pattern.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
    if destination.exists():
        shutil.rmtree(_retired_path(destination), ignore_errors=True)


def publish(staged: Path, destination: Path) -> None:
    """Move ``staged`` to ``destination``; what was there is removed afterwards."""
    if not destination.is_dir() or not any(destination.iterdir()):
        staged.rename(destination)  # refuses a place that is occupied by now
        return
    if _exchanged(staged, destination):
        shutil.rmtree(staged, ignore_errors=True)
        return
    retired = _retired_path(destination)
    destination.rename(retired)
    try:
        staged.rename(destination)
    except BaseException:
        retired.rename(destination)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False where system or disk cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    code = rename(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    return bool(code == 0)


def recover(destination: Path) -> None:
    """Bring back what a process set aside and died before it put the new one in its place.

    Does nothing where there is nothing to bring back, or where the process is still at it.
    """
    destination = Path(os.path.realpath(destination))
    if destination.exists() or not _retired_path(destination).is_dir():
        return
    try:
        handle = _locked(_lock_path(destination))
    except OSError as refusal:
        _log.warning("%s cannot be brought back: %s.", destination, refusal)
        return
    if handle is None:
        return
    try:
        _restore(destination)
    finally:
        _lock_path(destination).unlink(missing_ok=True)
        os.close(handle)


def _restore(destination: Path) -> None:
    retired = _retired_path(destination)
    if retired.is_dir() and not destination.exists():
        _log.warning("%s: a process died while replacing it; the old one is back.", destination)
        retired.rename(destination)
