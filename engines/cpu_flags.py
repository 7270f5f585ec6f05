"""Tell which fast products this CPU has, from the flags that Linux lists."""

from __future__ import annotations

import functools
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def has_vnni(cpuinfo: Path = _CPUINFO) -> bool:
    """Tell whether the CPU multiplies INT8 into 32 bits at once, which is fast and exact."""
    return not _flags(cpuinfo).isdisjoint({"avx512_vnni", "avx_vnni", "amx_int8"})


def has_amx(cpuinfo: Path = _CPUINFO) -> bool:
    """Tell whether the CPU multiplies tiles of BF16 (Intel's Xeons since Sapphire Rapids)."""
    return "amx_bf16" in _flags(cpuinfo)


@functools.cache
def _flags(cpuinfo: Path) -> frozenset[str]:
    try:
        return frozenset(cpuinfo.read_text("utf-8", "replace").split())
    except OSError:
        return frozenset()
