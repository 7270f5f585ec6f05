"""End what hangs: in Python with an error that names the input, below Python with the process."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class HangError(BaseException):
    """Nothing under test may catch it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Allow a piece of work so many seconds; a call that never comes back ends the process."""

    def give_up(_signal: int, _frame: FrameType | None) -> None:
        raise HangError(f"still not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
