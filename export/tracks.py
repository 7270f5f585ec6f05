"""Show how far work on a list is, with a bar for each list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.progress import track

Track = Callable[[Sequence[int], str], Iterable[int]]
"""Wraps numbers that are gone through, and says what is done with them."""


def silently(items: Sequence[int], line: str) -> Iterable[int]:
    """Show nothing."""
    return items


def show_tracks(console: Console) -> Track:
    """Return a function that shows a progress bar for a list."""
    return lambda items, line: track(items, line, console=console)
