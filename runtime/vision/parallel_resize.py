"""Run work on bands of one picture in several threads, so that one frame is ready sooner.

The work must release Python's lock to gain anything; Pillow's resizing and NumPy's copies do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import pairwise

_MOST_THREADS = 4
"""The rest of a robot wants cores, too."""


class Bands(AbstractContextManager["Bands"]):
    """Runs work in bands; threads are started when first used.

    Attributes:
        threads: how many bands are worked on at once.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Choose how many bands are worked on at once.

        Args:
            threads: at most four are used; left out, one for each core this process may use.
        """
        self.threads = min(threads or usable_cores(), _MOST_THREADS)
        self._pool: ThreadPoolExecutor | None = None

    def run(self, work: Callable[[slice], None], whole: slice, count: int) -> None:
        """Call ``work`` with bands that are the whole together, and wait for all.

        Args:
            work: what is to be done with a band; called by several threads at once.
            whole: first index, and one behind the last.
            count: how many bands, none of them empty.
        """
        length = whole.stop - whole.start
        edges = [whole.start + length * at // count for at in range(count + 1)]
        left = iter([slice(*pair) for pair in pairwise(edges)])

        def work_on() -> None:
            for band in left:
                work(band)

        helpers = [self._opened().submit(work_on) for _ in range(min(self.threads, count) - 1)]
        work_on()
        for helper in helpers:
            if not helper.cancel():  # on a busy machine it may not have begun: nothing is left
                helper.result()

    def _opened(self) -> ThreadPoolExecutor:
        if self._pool is None:
            # No more than are needed: each thread keeps some megabytes for itself once it was used.
            self._pool = ThreadPoolExecutor(max(self.threads - 1, 1), thread_name_prefix="bands")
        return self._pool

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; calling it again does nothing."""
        if self._pool is not None:
            self._pool.shutdown()


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


ALONE = Bands(threads=1)
"""The calling thread does everything."""
