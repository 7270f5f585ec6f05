"""Tell on stderr how far long work is: a bar, or lines where there is no screen.

Lines come when another thing begins and every few seconds.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

LINE_EVERY_S = 5.0


class Progress(Protocol):
    """The function that long work calls while it runs."""

    def __call__(self, line: str, done: float) -> None:
        """Report what is being done, and the share of the whole that is done, 0 to 1."""


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Give work somewhere to tell its progress: a bar or lines on stderr."""
    if not sys.stderr.isatty():
        yield ProgressLines(sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("Starting", total=1.0)
        yield lambda line, done: bar.update(task, description=line, completed=done)


class ProgressLines:
    """Writes `1:05  42%  what is being done` for each new thing and every few seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._start = clock()
        self._told_at = self._start
        self._told = ""

    def __call__(self, line: str, done: float) -> None:
        """Write a line, if it is time for one."""
        now = self._clock()
        thing = re.sub(r"[\d.,]+", "", line)
        if thing == self._told and (now - self._told_at < LINE_EVERY_S):
            return
        self._told, self._told_at = thing, now
        minutes, seconds = divmod(int(now - self._start), 60)
        print(f"{minutes:3d}:{seconds:02d} {done:4.0%}  {line}", file=self._stream, flush=True)
