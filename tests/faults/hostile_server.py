"""A server on the loopback interface that sends any bytes, for as long as it is told.

Enters: a response, as bytes or as an endless run of them. Leaves: the address to ask at.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Response = Callable[[], Iterator[bytes]]


class HostileServer:
    """Answers every question with one response; a test sets it.

    Attributes:
        response: called for each connection; what it yields is sent.
        url: where to ask.
    """

    def __init__(self) -> None:
        self.response: Response = lambda: iter(())
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        """Answer one connection after another until it is closed."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def close(self) -> None:
        # A listener that somebody waits on wakes up when it is shut down, not when it is closed.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _answer(self, connection: socket.socket) -> None:
        response = self.response
        with connection, suppress(OSError):
            connection.settimeout(10)
            _read_request(connection)
            for part in response():
                connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)


def _read_request(connection: socket.socket) -> None:
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    lines = [line.split(b":") for line in head.lower().split(b"\r\n")]
    wanted = sum(int(line[1]) for line in lines if line[0] == b"content-length")
    while len(body) < wanted:
        body += connection.recv(65536)


@contextmanager
def hostile_server() -> Iterator[HostileServer]:
    server = HostileServer()
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()
