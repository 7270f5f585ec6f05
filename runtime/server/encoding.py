"""Encode the pictures of concurrent requests: those that wait together run as one batch.

One thread runs the vision graphs. What it gave for a picture is remembered for a while, because a
client sends all pictures of a conversation with every question.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from engines.errors import FoveateError
from runtime.server.seen_picture import SeenPicture
from runtime.server.ticket import Ticket
from runtime.vision import Pixels, VisualTokens
from runtime.vision.graph_pool import GraphPool
from runtime.vision.visual_tokens import Shown

Key = tuple[bytes, int, Shown]
"""Digest of a picture file, the budget, and how it was shown."""


@dataclass(eq=False)  # a job is itself: pictures cannot be compared
class _Job:
    pixels: Pixels
    tokens: int
    ticket: Ticket
    shown: Shown
    future: Future[VisualTokens] = field(default_factory=Future)

    @property
    def alike(self) -> tuple[int, Shown]:
        """What the pictures of a batch have in common."""
        return self.tokens, self.shown


class EncodingThread:
    """Runs a bundle's vision graphs, one batch after the other.

    Attributes:
        batch: most pictures in one.
        observe: called with the size and the seconds of each batch.
    """

    def __init__(
        self,
        graphs: GraphPool,
        batch: int,
        observe: Callable[[int, float], None] = lambda count, seconds: None,
    ) -> None:
        self.batch = batch
        self.observe = observe
        self._graphs = graphs
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="encoding", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still works."""
        return self._thread.is_alive()

    def encode(
        self, pixels: Pixels, tokens: int, ticket: Ticket, shown: Shown = "alone"
    ) -> Future[VisualTokens]:
        """Put a picture into the queue.

        Args:
            pixels: uint8[H, W, 3].
            tokens: a budget of the bundle.
            ticket: of the request; once it is over the picture is left out.
            shown: alone, or among others.
        """
        job = _Job(pixels, tokens, ticket, shown)
        with self._changed:
            if self._closed:
                job.future.cancel()
            else:
                self._waiting.append(job)
                self._changed.notify()
        return job.future

    def close(self) -> None:
        """End the thread; pictures that still wait are cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for job in self._waiting:
            job.future.cancel()

    def _run(self) -> None:
        while jobs := self._next_batch():
            started = time.perf_counter()
            self._encode(jobs)
            self.observe(len(jobs), time.perf_counter() - started)

    def _next_batch(self) -> list[_Job]:
        """Return what waits, of one budget; nothing at the end."""
        with self._changed:
            while True:
                for job in [job for job in self._waiting if job.ticket.over()]:
                    self._waiting.remove(job)
                    job.future.cancel()
                if self._closed:
                    return []
                if self._waiting:
                    break
                self._changed.wait()
            alike = self._waiting[0].alike
            jobs = [job for job in self._waiting if job.alike == alike][: self.batch]
            for job in jobs:
                self._waiting.remove(job)
        return [job for job in jobs if job.future.set_running_or_notify_cancel()] or (
            self._next_batch()
        )

    def _encode(self, jobs: list[_Job]) -> None:
        try:
            encoder = self._graphs.encoder(jobs[0].tokens)
            seen = encoder.encode([job.pixels for job in jobs], jobs[0].shown)
        except FoveateError as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:  # one picture must not cost the others their answer
                self._encode([job])
        except Exception as error:  # a defect: the request fails, and the thread goes on
            for job in jobs:
                job.future.set_exception(error)
        else:
            for job, one in zip(jobs, seen.split(), strict=True):
                job.future.set_result(one)


class Remembered:
    """Pictures seen lately; the longest unused ones go first.

    Attributes:
        most_bytes: all of them together.
        bytes: now.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._seen: OrderedDict[Key, SeenPicture] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: Key) -> SeenPicture | None:
        """Return what a picture became, at no cost, if it is remembered."""
        with self._lock:
            seen = self._seen.get(key)
            if seen is None:
                return None
            self._seen.move_to_end(key)
            return replace(seen, milliseconds=dict.fromkeys(seen.milliseconds, 0.0))

    def keep(self, key: Key, seen: SeenPicture) -> None:
        """Remember what a picture became."""
        with self._lock:
            if key in self._seen or seen.memory_bytes > self.most_bytes:
                return
            self._seen[key] = seen
            self.bytes += seen.memory_bytes
            while self.bytes > self.most_bytes:
                _, oldest = self._seen.popitem(last=False)
                self.bytes -= oldest.memory_bytes
