"""Run a command and measure its time, the memory of all its processes, and its room on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Measured:
    """What a command took.

    Attributes:
        stdout: what it printed.
        seconds: by the clock on the wall.
        resident_bytes: most that its processes held, pages of mapped files included.
        private_bytes: most that they held without such pages, which the system takes back at need.
        disk_bytes: most that the directory grew by.
    """

    stdout: str
    seconds: float
    resident_bytes: int
    private_bytes: int
    disk_bytes: int


def run_watched(module: str, *arguments: object, folder: Path) -> Measured:
    """Run `python -m module arguments`, its progress on this process's stderr.

    Args:
        module: what to run.
        arguments: its options.
        folder: whose growth to measure.

    Raises:
        RuntimeError: it did not end with 0.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    before = _bytes_below(folder)
    most = [0, 0, 0]
    done = threading.Event()
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def look() -> None:
            while not done.wait(_LOOK_EVERY_S):
                resident, private = _memory_of_tree(process.pid)
                grown = _bytes_below(folder) - before
                for index, value in enumerate((resident, private, grown)):
                    most[index] = max(most[index], value)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        stdout, _ = process.communicate()
        done.set()
        watcher.join()
    seconds = time.monotonic() - start
    if process.returncode != 0:
        raise RuntimeError(
            f"{' '.join(command)} ended with {process.returncode}:\n{stdout[-2000:]}"
        )
    return Measured(stdout, seconds, *most)


def _bytes_below(folder: Path) -> int:
    """Return what a directory takes on the disk; a file with two names counts once."""
    files: dict[int, int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(Path(place, name))
            except OSError:  # gone since it was listed
                continue
            files[found.st_ino] = found.st_blocks * 512
    return sum(files.values())


def _memory_of_tree(root: int) -> tuple[int, int]:
    """Return resident bytes, and those that no file lies behind, of a process and its children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            parent = _parent_of(entry)
            if parent is not None:
                children.setdefault(parent, []).append(int(entry.name))
    resident = private = 0
    waiting = [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        fields = _status_of(process)
        resident += fields.get("VmRSS", 0)
        private += fields.get("RssAnon", 0) + fields.get("RssShmem", 0)
    return resident, private


def _parent_of(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):  # ended since it was listed
        return None


def _status_of(process: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}
