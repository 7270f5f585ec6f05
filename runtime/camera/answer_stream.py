"""What every camera loop is to whoever runs it: answers to iterate over, and ways to steer it.

A loop brings the work of its threads; here they are started, heard and left. Every hand-over is
bounded, and a thread that hangs in a driver or a backend is told of and, at the end, left behind.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Sequence

from engines.errors import OptionError
from runtime.camera.parts import CameraAnswer, CameraOptions, Stall

TICK_S = 0.05
"""How soon a waiting thread notices that the loop was stopped."""
_JOIN_S = 2.0


class AnswerStream(ABC):
    """Iterate over `answers`, and control it from any thread.

    Attributes:
        frames: how many were received.
        drops: frames that were not answered, by reason.
    """

    def __init__(self, options: CameraOptions) -> None:
        self.frames = 0
        self.drops: Counter[str] = Counter()
        self._options = options
        self._question = options.question
        self._changed = threading.Condition()
        self._paused = self._stopping = False
        self._asked_s: float | None = None  # since when an answer is waited for
        self._out: queue.Queue[CameraAnswer | BaseException | None] = queue.Queue(maxsize=4)

    @property
    @abstractmethod
    def errors(self) -> Counter[str]:
        """What could not be read, by reason."""

    @abstractmethod
    def _threads(self) -> Sequence[Callable[[], None]]:
        """Return the work of each thread; one of them puts None at the end."""

    @abstractmethod
    def _close_sources(self) -> None:
        """Close what frames come from; calling it again does nothing."""

    def answers(self) -> Generator[CameraAnswer | Stall, None, None]:
        """Run the loop and yield what comes of it, until the source ends or `stop` is called.

        Raises:
            FoveateError: the language model failed five times in a row.
        """
        threads = [
            threading.Thread(target=self._guarded, args=(work,), name="camera loop", daemon=True)
            for work in self._threads()
        ]
        for thread in threads:
            thread.start()
        reported_s = self._options.stall_after_s
        try:
            while True:
                try:
                    item = self._out.get(timeout=TICK_S)
                except queue.Empty:
                    asked_s = self._asked_s
                    waited_s = 0.0 if asked_s is None else time.monotonic() - asked_s
                    if waited_s < self._options.stall_after_s:
                        reported_s = self._options.stall_after_s
                    elif waited_s >= reported_s:
                        reported_s = 2 * waited_s
                        yield Stall(waited_s)
                    if self._stopping:
                        return
                    continue
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.stop()
            for thread in threads:
                thread.join(timeout=_JOIN_S)

    def stop(self) -> None:
        """End the loop and close the source; calling it again does nothing."""
        self._stopping = True  # before any lock: a signal handler may interrupt its holder
        self._close_sources()

    def pause(self) -> None:
        """Answer no more frames until `resume`; the source goes on being read."""
        self._paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False

    def ask(self, question: str) -> None:
        """Change the question, from the next answer on.

        Raises:
            OptionError: it is empty.
        """
        if not question.strip():
            raise OptionError("The question is empty.")
        self._question = question

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._put(error)

    def _put(self, item: CameraAnswer | BaseException | None) -> None:
        while not self._stopping:
            try:
                self._out.put(item, timeout=TICK_S)
            except queue.Full:
                continue
            return
