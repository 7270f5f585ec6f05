"""Serve a WSGI application over HTTP so that idle or slow clients cannot exhaust it.

Each connection has a thread and so much time in all, whatever it sends; of too many at once, the
newest are closed unanswered.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

ADDRESS = "127.0.0.1"
MOST_CONNECTIONS = 8
LONGEST_S = 5.0
"""Seconds from a connection's beginning to its end."""


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class BoundedServer(ThreadingMixIn, WSGIServer):
    """Serves an application until `shutdown`."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], application: Callable[..., Iterable[bytes]]
    ) -> None:
        """Begin to listen.

        Args:
            address: interface and port; port 0 is any that is free.
            application: what answers.

        Raises:
            OSError: the port is taken.
            OverflowError: it is no port.
        """
        self._lock = threading.Lock()
        self._since_s: dict[socket.socket, float] = {}
        super().__init__(address, _QuietHandler)
        self.set_app(application)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, unless there are too many."""
        with self._lock:
            full = len(self._since_s) >= MOST_CONNECTIONS
            if not full:
                self._since_s[request] = time.monotonic()
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and forget it."""
        with self._lock:
            self._since_s.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut off, twice a second, what has taken too long; its thread then ends."""
        now_s = time.monotonic()
        with self._lock:
            late = [each for each, since_s in self._since_s.items() if now_s - since_s > LONGEST_S]
        for request in late:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that went away is not of interest."""
