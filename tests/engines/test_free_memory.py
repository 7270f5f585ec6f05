"""Available memory: the machine's, or what a container leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.free_memory import read_free_memory

MEMINFO = "MemTotal: 2000 kB\nMemAvailable: 1000 kB\nSwapFree: 24 kB\n"
MACHINE = 1024 * 1024


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, MACHINE),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max"}, MACHINE),
        (
            {
                "proc/self/cgroup": "0::/box/inner\n",
                "sys/fs/cgroup/box/memory.max": "5000",
                "sys/fs/cgroup/box/memory.current": "4000",
                "sys/fs/cgroup/box/memory.stat": "anon 10\ninactive_file 300\n",
                "sys/fs/cgroup/box/inner/memory.max": "max",
                "sys/fs/cgroup/box/inner/memory.current": "4000",
            },
            1300,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,memory:/job\n1:name=systemd:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "7000",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "6500",
                "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 100\n",
            },
            600,
        ),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert read_free_memory(system(tmp_path, {"proc/meminfo": MEMINFO, **files})) == expected


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert read_free_memory(tmp_path) is None


def test_this_machine_says() -> None:
    assert (read_free_memory() or 0) > 0
