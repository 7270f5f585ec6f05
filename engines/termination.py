"""Let a process that is asked to end (SIGTERM) remove what it was writing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def end_in_order() -> Iterator[None]:
    """Make SIGTERM raise `SystemExit` while the block runs; 143 is what a shell reports of it."""

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
