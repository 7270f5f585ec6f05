"""Let a process that is asked to end (SIGTERM, Ctrl-C) remove what it was writing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_asked: list[int] = []
"""The signals that came while `end_in_order` was entered."""


@contextmanager
def end_in_order() -> Iterator[None]:
    """Make SIGTERM raise `SystemExit` while the block runs; 143 is what a shell reports of it."""

    def leave(number: int, _: object) -> None:
        _asked.append(number)
        leave_if_asked()

    _asked.clear()
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
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
