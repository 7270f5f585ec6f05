"""Write a file or a directory completely or not at all.

A result is written beside its destination and renamed when the `with` block ends well. It is
removed when the block fails, so a reader never sees a half-written result. What a killed process
left is removed by the next one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.errors import FoveateError
from engines.publishing import partial_prefix, publish, sole_writer

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXTS = ("no space left", "disk quota exceeded", "file too large", "disk full")
_STAGED_FILE = re.compile(r"\..*\.partial-[a-z0-9_]{8}(\..*)?")
_cleaned: set[Path] = set()
"""Folders in which this process has looked for what dead ones left."""


@contextmanager
def staged_file(destination: Path, error: type[FoveateError] = FoveateError) -> Iterator[Path]:
    """Give a temporary path beside ``destination`` and rename it there at the end.

    Args:
        destination: the file to write; an old one is replaced at once.
        error: what to raise when it cannot be written.

    Raises:
        FoveateError: of kind ``error``; the folder cannot be written or the disk is full.
    """
    with _explained(destination, error):
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.is_dir():
            raise error(f"{destination} is a directory, expected the name of a file to write.")
        with _folder_in_use(destination.parent):
            handle, name = tempfile.mkstemp(
                prefix=f".{destination.stem}.partial-",
                suffix=destination.suffix,
                dir=destination.parent,
            )
            os.close(handle)
            staged = Path(name)
            try:
                yield staged
                staged.chmod(0o666 & ~_umask())
                staged.replace(destination)
            finally:
                staged.unlink(missing_ok=True)


@contextmanager
def _folder_in_use(folder: Path) -> Iterator[None]:
    """Hold a shared lock of a folder while a file is staged in it.

    Whoever has the folder to itself knows that staged files in it belong to dead processes, and
    removes them. Disks without locks are never cleaned.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if (known := folder.absolute()) not in _cleaned:
            _cleaned.add(known)
            if _try_lock(handle, fcntl.LOCK_EX):
                _remove_staged_files(folder)
        _try_lock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_staged_files(folder: Path) -> None:
    for entry in list(folder.iterdir()):
        if _STAGED_FILE.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
            entry.unlink(missing_ok=True)


@contextmanager
def staged_directory(
    destination: Path,
    error: type[FoveateError] = FoveateError,
    expected_bytes: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Give a new directory beside ``destination`` and move it there at the end.

    An old directory stays in place until the new one is complete, and is exchanged for it in one
    step. One process at a time writes to a place.

    Args:
        destination: the directory to write.
        error: what to raise when it cannot be written.
        expected_bytes: about how much will be written; too little room is refused before any work.
        check: called before any work and again before the move; it raises where what lies at
            ``destination`` may not be replaced.

    Raises:
        FoveateError: of kind ``error``; the folder cannot be written, the disk is full, or another
            process writes there.
    """
    destination = destination.resolve()
    with _explained(destination, error, expected_bytes):
        destination.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(destination.parent).free
        if expected_bytes is not None and free_bytes < expected_bytes:
            raise error(_full_disk_message(destination, expected_bytes))
        with sole_writer(destination, error):
            check()
            staged = Path(
                tempfile.mkdtemp(prefix=partial_prefix(destination), dir=destination.parent)
            )
            try:
                yield staged
                staged.chmod(0o777 & ~_umask())
                check()
                publish(staged, destination)
            finally:
                shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def _explained(
    destination: Path, error: type[FoveateError], expected_bytes: int | None = None
) -> Iterator[None]:
    """Turn an error of the disk, from any library, into an error of the project."""
    try:
        yield
    except FoveateError:
        raise
    except Exception as refusal:
        if is_disk_full(refusal):
            raise error(_full_disk_message(destination, expected_bytes)) from refusal
        if isinstance(refusal, PermissionError | NotADirectoryError | FileExistsError) or _refused(
            refusal
        ):
            raise error(
                f"{destination} cannot be written: {refusal}. Choose a folder you may write to."
            ) from refusal
        raise


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error, or what caused it, is a disk (or quota) that is full.

    Writers in C++ and Rust report it as text rather than as an OSError with a number.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    if any(text in str(error).lower() for text in _FULL_TEXTS):
        return True
    return error.__cause__ is not None and is_disk_full(error.__cause__)


def _refused(error: BaseException) -> bool:
    """Tell whether the disk is read-only, or something is in the way by now."""
    return isinstance(error, OSError) and error.errno in {errno.EROFS, errno.ENOTEMPTY}


def _full_disk_message(destination: Path, expected_bytes: int | None) -> str:
    free_bytes = shutil.disk_usage(_existing_parent(destination)).free
    needed = f", about {_size(expected_bytes)} is needed" if expected_bytes else ""
    return (
        f"No room to write {destination}: {_size(free_bytes)} is free on that disk{needed}. "
        "Nothing was left behind. Free some space (and check quotas and file size limits), or "
        "write to another disk."
    )


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _size(count: int) -> str:
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_each:
            return f"{count / bytes_each:.1f} {unit}"
    return f"{count} bytes"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
