"""Cut off connections that ask nothing, or take an answer too slowly.

uvicorn waits without end for a request's first line, and for a client that does not read.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_S = 60.0
"""Seconds until a request must have come, since the connection or the last answer."""
_CLOSING_S = 5.0
"""Seconds for what is left to be read of a connection that is being closed."""


def timed_protocol(request_s: float, idle_s: float) -> type[H11Protocol]:
    """Return uvicorn's protocol with limits of time.

    Args:
        request_s: for a request and its answer.
        idle_s: between them.
    """

    class TimedProtocol(H11Protocol):
        """One connection."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._allow(idle_s)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before and self.cycle is not None:
                self._allow(_CLOSING_S if self.cycle.response_complete else request_s)

        def on_response_complete(self) -> None:
            before = self.cycle
            super().on_response_complete()
            waits = self.cycle is not before  # the next request had come already
            closing = self.transport.is_closing()
            self._allow(_CLOSING_S if closing else request_s if waits else idle_s)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def _allow(self, seconds: float) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(seconds, self.transport.abort)

    return TimedProtocol
