"""How far long work is, told to whoever watches: a bar on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What long work tells while it runs."""

    def __call__(self, line: str, done: float) -> None:
        """Say what is being done, and the share of the whole that is behind, 0 to 1."""


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Give work somewhere to tell its progress: a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("Starting", total=1.0)
        yield lambda line, done: bar.update(task, description=line, completed=done)
