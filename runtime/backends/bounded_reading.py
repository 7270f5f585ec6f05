"""Read what a server sends within a time and a size.

The limits hold for every byte, so the status line, the headers, comments and the pieces of an
answer are all bound by them.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from http.client import HTTPResponse
from socket import socket
from typing import Any, cast

from engines.errors import BackendError


class Patience:
    """How long one question may still take, and how much may still be sent.

    Attributes:
        silence_seconds: longest wait for the next thing of use; a comment is none.
        total_seconds: longest time of the question, repeated attempts included.
    """

    def __init__(
        self,
        silence_seconds: float,
        total_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.silence_seconds = silence_seconds
        self.total_seconds = total_seconds
        self._clock = clock
        self._end = clock() + total_seconds
        self.begin(0)

    def begin(self, most_bytes: int) -> None:
        """Begin another response, of so many bytes at most."""
        self._most_bytes, self._bytes = most_bytes, 0
        self.hear()

    def hear(self) -> None:
        """Take note that something of use has come."""
        self._quiet_end = self._clock() + self.silence_seconds

    def count(self, received: int) -> None:
        """Count bytes.

        Raises:
            BackendError: they are more than a response may have.
        """
        self._bytes += received
        if self._bytes > self._most_bytes:
            raise BackendError(
                f"The server sent more than {self._most_bytes} bytes in one response, and was not "
                "heard any further. Look at what serves this address."
            )

    def left_seconds(self) -> float:
        """Return how long to wait for the next byte.

        Raises:
            TimeoutError: no longer.
        """
        left = min(self._end, self._quiet_end) - self._clock()
        if left <= 0:
            raise TimeoutError(self.describe())
        return left

    @property
    def total_left_seconds(self) -> float:
        """How long the question may still take; 0 or less once its time is over."""
        return self._end - self._clock()

    def describe(self) -> str:
        """Return which of the two limits ended it."""
        if self.total_left_seconds <= 0:
            return f"took longer than {self.total_seconds:g} s"
        return f"fell silent for {self.silence_seconds:g} s"


def read_response(connection: socket, method: str, patience: Patience) -> HTTPResponse:
    """Return the response that comes over a connection, read as far as its headers.

    Raises:
        TimeoutError: there is no patience left.
        BackendError: more bytes than it may have.
        OSError: the connection failed.
        HTTPException: it is not HTTP.
    """
    source = cast("socket", _PatientSocket(connection, patience))
    response = HTTPResponse(source, method=method)
    response.begin()
    return response


class _PatientSocket:
    """As much of a socket as `HTTPResponse` asks for."""

    def __init__(self, connection: socket, patience: Patience) -> None:
        self._reader = _PatientReader(connection, patience)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._reader)


class _PatientReader(io.RawIOBase):
    def __init__(self, connection: socket, patience: Patience) -> None:
        super().__init__()
        self._connection = connection
        self._patience = patience

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(self._patience.left_seconds())
        received = self._connection.recv_into(buffer)
        self._patience.count(received)
        return received
