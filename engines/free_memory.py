"""Read how much memory this process may still take, of the machine and of its container.

Linux only: it reads /proc and the control groups. Elsewhere the answer is None.
"""

from __future__ import annotations

from pathlib import Path

from engines.device_facts import read_memory


def read_free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that are available, swap included; the smallest limit counts.

    Args:
        root: the system's root, another one in tests.
    """
    memory = read_memory(root / "proc/meminfo")
    if "MemAvailable" not in memory:
        return None
    machine = memory["MemAvailable"] + memory.get("SwapFree", 0)
    limits = [machine, *_group_limits(root)]
    return max(0, min(limits))


def _group_limits(root: Path) -> list[int]:
    """Return what is left of each control group that this process is in, versions 2 and 1."""
    groups = root / "sys/fs/cgroup"
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, cache = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit = groups / "memory", "memory.limit_in_bytes"
            used, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        inside = top / path.lstrip("/")
        for folder in (inside, *inside.parents):
            room = _room(folder, limit, used, cache)
            if room is not None:
                left.append(room)
            if folder == top:
                break
    return left


def _room(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """Return what one group may still take; files in its cache can be given back."""
    most, taken = _text(folder / limit), _text(folder / used)
    if not most.isdecimal() or not taken.isdecimal():
        return None
    statistics = dict(
        line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line
    )
    return int(most) - int(taken) + int(statistics.get(cache, 0))


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8").strip()
    except OSError:
        return ""
