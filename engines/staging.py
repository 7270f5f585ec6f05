"""Write a file or a directory completely or not at all.

A result is written beside its destination and renamed when the `with` block ends well. It is
removed when the block fails, so a reader never sees a half-written result.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.errors import FoveateError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RETIRED = ".old"
_FULL_TEXTS = ("no space left", "disk quota exceeded", "file too large", "disk full")


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
        handle, name = tempfile.mkstemp(
            prefix=f".{destination.stem}.", suffix=destination.suffix, dir=destination.parent
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
def staged_directory(
    destination: Path,
    error: type[FoveateError] = FoveateError,
    expected_bytes: int | None = None,
) -> Iterator[Path]:
    """Give a new directory beside ``destination`` and move it there at the end.

    An old directory stays in place until the new one is complete. The caller decides beforehand
    whether it may be replaced.

    Args:
        destination: the directory to write.
        error: what to raise when it cannot be written.
        expected_bytes: about how much will be written; too little room is refused before any work.

    Raises:
        FoveateError: of kind ``error``; the folder cannot be written or the disk is full.
    """
    with _explained(destination, error, expected_bytes):
        destination.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(destination.parent).free
        if expected_bytes is not None and free_bytes < expected_bytes:
            raise error(_full_disk_message(destination, expected_bytes))
        with scratch_directory(destination, "partial") as staged:
            yield staged
            staged.chmod(0o777 & ~_umask())
            _swap(staged, destination)


@contextmanager
def scratch_directory(destination: Path, kind: str) -> Iterator[Path]:
    """Give a new directory beside ``destination`` that is gone when the block ends.

    A process that is killed cannot remove its own, so the next one removes it: a directory of this
    name that no living process holds locked.

    Args:
        destination: what is being made.
        kind: what the directory is for; in its name, which begins with the destination's.
    """
    prefix = f"{destination.name}.{kind}-"
    for left in destination.parent.glob(f"{glob.escape(prefix)}*"):
        if left.name.endswith(_RETIRED) and not destination.exists():
            left.rename(destination)  # it was being replaced when the process was killed
        else:
            _remove_if_abandoned(left)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))
    lock = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _remove_if_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return  # another process is writing it now
    finally:
        os.close(lock)


def _swap(staged: Path, destination: Path) -> None:
    """Move ``staged`` to ``destination``; an old one comes back if that fails."""
    if not destination.exists():
        staged.rename(destination)
        return
    retired = staged.with_name(f"{staged.name}{_RETIRED}")
    destination.rename(retired)
    try:
        staged.rename(destination)
    except BaseException:
        retired.rename(destination)
        raise
    shutil.rmtree(retired, ignore_errors=True)


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
        if isinstance(
            refusal, PermissionError | NotADirectoryError | FileExistsError
        ) or _read_only(refusal):
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


def _read_only(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EROFS


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
