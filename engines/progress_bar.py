"""Show the progress of long work as a bar on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """The function that long work calls while it runs."""

    def __call__(self, line: str, done: float) -> None:
        """Report what is being done, and the share of the whole that is done, 0 to 1."""


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Show a bar on stderr and yield the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("Starting", total=1.0)
        yield lambda line, done: bar.update(task, description=line, completed=done)
