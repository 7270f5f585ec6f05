"""The time that one request has, and whether its client still waits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from runtime.server.refusals import ClientGoneError, RefusalError

T = TypeVar("T")
Receive = Callable[[], Awaitable[Any]]


class Ticket:
    """One request on its way through the server.

    Attributes:
        seconds: how long it may take.
        milliseconds: time by stage.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.milliseconds: dict[str, float] = {}
        self._chosen = False
        self._started = time.monotonic()
        self._given_up = threading.Event()

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; 0 or less once it has passed."""
        return self._started + self.seconds - time.monotonic()

    @property
    def spent_s(self) -> float:
        """Seconds since it came."""
        return time.monotonic() - self._started

    def shorten(self, seconds: float | None) -> None:
        """Bring the deadline forward, as the client asked."""
        if seconds is not None and seconds < self.seconds:
            self.seconds, self._chosen = seconds, True

    def give_up(self) -> None:
        """Tell every thread that works for this request to stop."""
        self._given_up.set()

    def over(self) -> bool:
        """Return whether nobody waits for more."""
        return self._given_up.is_set() or self.left_s <= 0

    def require_time(self) -> None:
        """Check that somebody still waits.

        Raises:
            ClientGoneError: the client left.
            RefusalError: the deadline passed.
        """
        if self.left_s <= 0:
            raise self.deadline_passed()
        if self._given_up.is_set():
            raise ClientGoneError

    def deadline_passed(self) -> RefusalError:
        """Return what the client is told at the deadline: its own, or the server's."""
        return RefusalError(
            408 if self._chosen else 504,
            f"The answer was not ready within {self.seconds:g} s. Ask for fewer tokens, send fewer "
            "requests at once, or start the server with a larger --deadline.",
            "deadline_exceeded",
        )

    async def wait_for(self, work: Coroutine[Any, Any, T], receive: Receive) -> T:
        """Return what ``work`` returns, unless the client goes or the deadline passes.

        Raises:
            ClientGoneError: the connection was closed.
            RefusalError: the deadline passed.
        """
        working = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait(
                {working, gone}, timeout=max(self.left_s, 0), return_when=asyncio.FIRST_COMPLETED
            )
            if working.done() and not working.cancelled():
                return working.result()
            self.give_up()
            raise ClientGoneError if gone.done() else self.deadline_passed()
        finally:
            for task in (working, gone):
                if not task.done():
                    task.cancel()
                    with suppress(asyncio.CancelledError, Exception):
                        await task


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
