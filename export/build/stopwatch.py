"""Measure how long each step of a build takes, and tell how far the whole is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from engines.progress_bar import Progress


class Steps:
    """Keeps the time of each step and tells how far the whole is.

    Attributes:
        seconds: of each step that is done.
    """

    def __init__(self, progress: Progress, expected_s: Mapping[str, float]) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._expected_s = expected_s

    @property
    def behind(self) -> float:
        """The share of the work that is done."""
        return sum(map(self._share, self.seconds))

    def _share(self, name: str) -> float:
        whole = sum(self._expected_s.values())
        return self._expected_s.get(name, 0.0) / whole if whole else 0.0

    @contextmanager
    def step(self, name: str, line: str) -> Iterator[Progress]:
        """Begin a step and give it somewhere to tell its own progress."""
        begun, share = self.behind, self._share(name)
        self._progress(line, begun)
        start = time.perf_counter()
        yield lambda line, done: self._progress(line, min(begun + done * share, 1.0))
        self.seconds[name] = round(time.perf_counter() - start, 2)
