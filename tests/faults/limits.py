"""Limits that a hostile input must keep to: an alarm, and a cap on the memory of this process."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Hang(BaseException):
    """An input took longer than its limit; not an Exception, so that no handler swallows it."""


@contextmanager
def bounded(seconds: float, memory_bytes: int) -> Iterator[None]:
    """Stop a block that runs too long, and refuse it more memory than this beyond today's."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"still running after {seconds} s")

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory_bytes, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, handler)
