"""Reconnect a live source after a cable was pulled, a camera rebooted or a network dropped.

The wait between attempts grows from 0.1 s to 5 s and starts again after each success.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from runtime.frames.frame import Capture, Reader, ReadErrors

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0


class Reconnecting:
    """Opens a live reader again whenever it ends, until it is closed.

    The first opening happens here and its error is the user's to see; later ones are counted.
    """

    live = True

    def __init__(
        self,
        open_reader: Callable[[], Reader],
        first_wait_s: float = FIRST_WAIT_S,
        longest_wait_s: float = LONGEST_WAIT_S,
    ) -> None:
        """Open the reader for the first time.

        Raises:
            SourceError: it cannot be opened.
        """
        self._open = open_reader
        self._waits_s = (first_wait_s, longest_wait_s)
        self._closed = threading.Event()
        self._reader = open_reader()
        self.name = self._reader.name

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        """Yield captures until `close`."""
        first_wait_s, longest_wait_s = self._waits_s
        wait_s = first_wait_s
        while True:
            try:
                for capture in self._reader.captures(errors):
                    if self._closed.is_set():
                        return
                    wait_s = first_wait_s
                    yield capture
            except Exception as error:  # a driver's: the next connection may be better
                errors.count("source failed", repr(error))
            self._reader.close()
            if self._closed.is_set():
                return
            errors.count("disconnected", "the source ended; opening it again")
            while True:
                if self._closed.wait(wait_s):
                    return
                wait_s = min(wait_s * 2, longest_wait_s)
                try:
                    self._reader = self._open()
                except Exception as error:
                    errors.count("reconnection failed", error)
                else:
                    break
            if self._closed.is_set():  # closed while it was being opened
                self._reader.close()
                return

    def close(self) -> None:
        """Stop and let the device go."""
        self._closed.set()
        self._reader.close()
