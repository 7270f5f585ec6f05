"""Try hostile inputs in a process of its own, so that an abort or a hang is counted and not met.

Enters: cases, and what to do with one. Leaves: how many were accepted and refused, and a line for
each that did anything else than raise a `FoveateError`.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, TypeVar

from engines.errors import FoveateError

Case = TypeVar("Case")


class Hang(BaseException):
    """An input took longer than its limit; not an Exception, so that no handler swallows it."""


@dataclass
class Outcome:
    """What became of the cases."""

    accepted: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.accepted + self.refused + len(self.failures)

    def check(self, name: str, capsys: Any) -> None:
        """Print the counts, for docs/reliability.md, and fail where there are failures."""
        with capsys.disabled():
            print(
                f"\n{name}: {self.tried} tried, {self.accepted} accepted, {self.refused} refused, "
                f"{len(self.failures)} failures"
            )
        assert not self.failures, "\n\n".join(self.failures[:8])


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


def try_all(
    cases: Sequence[Case],
    work: Callable[[Case], object],
    reset: Callable[[], object] = lambda: None,
    *,
    seconds: float = 30,
    memory_bytes: int = 3 << 30,
) -> Outcome:
    """Do the work with each case, in a fork that is replaced when it dies.

    Args:
        cases: what to try; its `repr` is told when it fails.
        work: accepts a case, or raises a `FoveateError`.
        reset: undoes what a case did that was cut short.
        seconds: for one case; afterwards Python is interrupted, and later the process killed.
        memory_bytes: what a case may take beyond what the process has already.
    """
    outcome = Outcome()
    start = 0
    while start < len(cases):
        reset()
        start = _try_in_a_fork(cases, work, start, outcome, seconds, memory_bytes)
    return outcome


def _try_in_a_fork(
    cases: Sequence[Case],
    work: Callable[[Case], object],
    start: int,
    outcome: Outcome,
    seconds: float,
    memory_bytes: int,
) -> int:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "wb", buffering=0) as pipe:
            code = _try_here(cases, work, start, pipe, seconds, memory_bytes)
        os._exit(code)
    os.close(writing)
    done = start
    with os.fdopen(reading, "rb") as pipe:
        deadline = time.monotonic() + 3 * seconds + 30
        waiting = b""
        while done < len(cases):
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                os.kill(child, signal.SIGKILL)
                break
            chunk = os.read(pipe.fileno(), 1 << 16)
            if not chunk:
                break
            waiting += chunk
            *records, waiting = waiting.split(b"\0")
            for record in records:
                kind, told = record[:1], record[1:].decode("utf-8", "replace")
                outcome.accepted += kind == b"a"
                outcome.refused += kind == b"r"
                if kind == b"f":
                    outcome.failures.append(told)
                done += 1
                deadline = time.monotonic() + 3 * seconds + 30
    _, status = os.waitpid(child, 0)
    if done < len(cases):
        ended = os.waitstatus_to_exitcode(status)
        outcome.failures.append(f"{cases[done]!r:.400}: the process ended with {ended}")
        done += 1
    return done


def _try_here(
    cases: Sequence[Case],
    work: Callable[[Case], object],
    start: int,
    pipe: BinaryIO,
    seconds: float,
    memory_bytes: int,
) -> int:
    for case in cases[start:]:
        record = b"a"
        try:
            with bounded(seconds, memory_bytes):
                work(case)
        except FoveateError as error:
            record = b"r" if str(error) and "\0" not in str(error) else b"fan empty message"
        except BaseException as error:  # whatever it is, it is what we look for
            frames = "".join(traceback.format_exception(error)[-6:])
            record = f"f{case!r:.400}: {type(error).__name__}\n{frames}".encode(errors="replace")
            record = record.replace(b"\0", b"?")
        pipe.write(record + b"\0")
    return 0
