"""Let a process that is asked to end (SIGTERM, Ctrl-C) remove what it was writing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_asked: list[int] = []
"""The signals that came while `end_in_order` was entered."""


@contextmanager
def end_in_order() -> Iterator[None]:
    """Raise what ends a process where SIGTERM or SIGINT comes while the block runs.

    SIGTERM raises `SystemExit`, of which a shell reports 143; SIGINT raises `KeyboardInterrupt`.
    A signal that the process ignores stays ignored, as SIGINT is in a script's background jobs.
    """

    def leave(number: int, _: object) -> None:
        _asked.append(number)
        leave_if_asked()

    _asked.clear()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: was for number, was in before.items() if was is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def leave_if_asked() -> None:
    """Raise again what a library may have made an error of its own of.

    A signal's exception is raised inside whatever Python code runs, also in code that a library
    written in another language called; safetensors makes "cannot read" of it.

    Raises:
        SystemExit: SIGTERM came.
        KeyboardInterrupt: SIGINT came.
    """
    if signal.SIGTERM in _asked:
        raise SystemExit(128 + signal.SIGTERM)
    if signal.SIGINT in _asked:
        raise KeyboardInterrupt
