"""Talk to a chat server over HTTP: stream answers, and repeat requests where that helps.

Every failure on the way becomes one error: no server, a refused key or question, silence, a
connection that ends in the middle of an answer, or one that never ends.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any

from engines.errors import BackendError, OptionError
from engines.secret import NO_SECRET, Secret
from runtime.backends.bounded_reading import Patience, read_response
from runtime.backends.chat_events import (
    Event,
    ServedModel,
    read_event,
    read_models,
    server_message,
    shown,
)
from runtime.backends.server_address import ServerAddress, read_address

_BUSY = (408, 429, 500, 502, 503, 504)
"""Statuses that another attempt may change."""
_LONGEST_PAUSE_S = 30.0
_MOST_ANSWER_BYTES = 64 << 20
_MOST_DOCUMENT_BYTES = 4 << 20
_MOST_SECONDS = 86400.0
_MOST_LINE_BYTES = 4 << 20
"""Of one event; the first may hold the ids of the whole prompt."""


class ServerLostError(BackendError):
    """A server that cannot be reached, is too busy or broke off: another one may answer."""


@dataclass(frozen=True)
class ServerOptions:
    """How to reach a server, and how patient to be with it.

    Attributes:
        url: its address with or without the path, for example ``http://192.168.1.5:8000/v1``.
        api_key: sent as a bearer token.
        model: the server's name for the language model; None takes the only one it has.
        connect_seconds: longest wait for a connection.
        silence_seconds: longest wait for the next piece of an answer, the first one included.
        answer_seconds: longest time of a whole answer, repeated attempts included.
        attempts: how often a request is sent at most; never again once an answer has begun.
        pause_seconds: wait before the second attempt; it doubles with every further one.
    """

    url: str
    api_key: Secret | None = None
    model: str | None = None
    connect_seconds: float = 5.0
    silence_seconds: float = 60.0
    answer_seconds: float = 600.0
    attempts: int = 4
    pause_seconds: float = 0.5

    def __post_init__(self) -> None:
        _ = self.address  # first: a wrong address is told at once
        if self.api_key is not None:
            self.api_key.require_sendable("The API key (--api-key or FOVEATE_API_KEY)")
        seconds = (self.connect_seconds, self.silence_seconds, self.answer_seconds)
        in_range = all(0 < value <= _MOST_SECONDS for value in seconds)
        if not in_range or self.attempts < 1 or not 0 <= self.pause_seconds <= _MOST_SECONDS:
            raise OptionError(
                "connect_seconds, silence_seconds, answer_seconds and attempts must be more than 0 "
                f"and pause_seconds 0 or more, and all times at most {_MOST_SECONDS:g} s."
            )

    @cached_property
    def address(self) -> ServerAddress:
        """The address, read."""
        return read_address(self.url)


class ChatServer:
    """One server that speaks OpenAI's Chat Completions.

    Attributes:
        options: how to reach it.
    """

    def __init__(self, options: ServerOptions, sleep: Callable[[float], None] = time.sleep) -> None:
        self.options = options
        self._sleep = sleep
        self._key = options.api_key or NO_SECRET

    def models(self) -> list[ServedModel]:
        """Return what the server says of the models it serves.

        Raises:
            BackendError: no server, or not one of this kind.
        """
        with self._send("GET", "models", None) as exchange:
            return read_models(exchange.text(), self.options.url, self._key)

    def stream(self, request: dict[str, Any]) -> Generator[Event]:
        """Ask, and yield the events of the answer as they come; close the iterator to cancel.

        Raises:
            BackendError: it cannot be answered; the message says why and what to do.
        """
        body = json.dumps({**request, "stream": True}, allow_nan=False).encode()
        with self._send("POST", "chat/completions", body) as exchange:
            yield from exchange.events(self.options.url)

    def _send(self, method: str, name: str, body: bytes | None) -> _Exchange:
        """Send until the server begins to answer; return what is to be read."""
        options = self.options
        patience = Patience(options.silence_seconds, options.answer_seconds)
        for attempt in range(1, options.attempts + 1):
            spread = random.uniform(0.8, 1.2)  # noqa: S311 - robots should not all come back at once
            pause = options.pause_seconds * 2 ** (attempt - 1) * spread
            exchange = _Exchange(self._connection(patience), patience, self._key)
            try:
                exchange.ask(method, f"{options.address.path}/{name}", body)
            except (OSError, HTTPException, ValueError) as error:
                exchange.close()
                problem: BackendError = self._explain_silence(error, attempt)
                if exchange.asked and isinstance(error, TimeoutError):
                    raise problem from error  # another attempt would add to its load
            except BaseException:
                exchange.close()
                raise
            else:
                if exchange.status < 300:
                    return exchange
                with exchange:
                    problem = self._explain_refusal(exchange.status, exchange.text())
                if exchange.status not in _BUSY:
                    raise problem
                pause = max(pause, exchange.wanted_pause())
            pause = min(pause, _LONGEST_PAUSE_S)
            if attempt == options.attempts or pause >= patience.total_left_seconds:
                raise problem
            self._sleep(pause)
        raise problem

    def _connection(self, patience: Patience) -> HTTPConnection:
        address = self.options.address
        kind = HTTPSConnection if address.secure else HTTPConnection
        limit_s = min(self.options.connect_seconds, max(patience.total_left_seconds, 0.001))
        return kind(address.host, address.port, timeout=limit_s)

    def _explain_silence(self, error: Exception, attempt: int) -> ServerLostError:
        times = "once" if attempt == 1 else f"{attempt} times"
        if isinstance(error, TimeoutError):
            return ServerLostError(
                f"{self.options.url} did not answer in time, asked {times} (limits: "
                f"{self.options.connect_seconds:g} s to connect, {self.options.silence_seconds:g} "
                f"s of silence, {self.options.answer_seconds:g} s in all). The server is "
                "overloaded or the network slow: lower its load, or wait longer with --llm-timeout "
                "(for the next piece) or --llm-deadline (for all of it)."
            )
        reason = shown(f"{type(error).__name__}: {error}", self._key)
        return ServerLostError(
            f"No answer from {self.options.url}, asked {times} ({reason}). "
            "Check that the server runs and the address and port are right, or answer on the robot "
            "with --backend ort."
        )

    def _explain_refusal(self, status: int, body: str) -> BackendError:
        said = server_message(body, self._key)
        if status in (401, 403):
            given = "the API key is refused" if self.options.api_key else "it wants an API key"
            return BackendError(
                f"{self.options.url}: {given} (HTTP {status}: {said}). Give the right one with "
                "--api-key or the environment variable FOVEATE_API_KEY."
            )
        if status == 404:
            return BackendError(
                f"{self.options.url}: no such model or page (HTTP 404: {said}). Expected the "
                "address of an OpenAI-style server, ending in /v1."
            )
        if status in _BUSY:
            return ServerLostError(
                f"{self.options.url} cannot answer now (HTTP {status}: {said}), asked up to "
                f"{self.options.attempts} times. Try again later or look at the server's log."
            )
        hint = (
            "Start it with --enable-prompt-embeds."
            if "enable-prompt-embeds" in body
            else "Check that it serves this bundle's language model and that the prompt fits its "
            "context."
        )
        return BackendError(
            f"{self.options.url} refuses the question (HTTP {status}: {said}). {hint}"
        )


def choose_model(server: ChatServer) -> ServedModel:
    """Return the model to ask for: the one that was named, or the only one there is.

    Raises:
        BackendError: no server, no such model, or several to choose from.
    """
    name = server.options.model
    served = {entry.id: entry for entry in server.models()}
    if name is None and len(served) == 1:
        name = next(iter(served))
    if name not in served:
        asked = "which one was not said" if name is None else f"and none is {name!r}"
        names = shown(", ".join(served)) or "no model"
        raise BackendError(
            f"{server.options.url} serves {names}, {asked}. Name one of its models with "
            "--llm-model."
        )
    return served[name]


class _Exchange:
    """One request and its response; leaving it closes the connection, which ends the server's work.

    Attributes:
        asked: whether the server was reached.
    """

    def __init__(self, connection: HTTPConnection, patience: Patience, key: Secret) -> None:
        self._connection, self._patience, self._key = connection, patience, key
        self._response: HTTPResponse | None = None
        self.asked = False

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def ask(self, method: str, path: str, body: bytes | None) -> None:
        """Send the request and read the response's headers."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key.reveal()}"
        self._connection.connect()
        self.asked = True
        self._patience.begin(_MOST_ANSWER_BYTES if body else _MOST_DOCUMENT_BYTES)
        self._connection.sock.settimeout(self._patience.left_seconds())
        self._connection.request(method, path, body, headers)
        self._response = read_response(self._connection.sock, method, self._patience)

    @property
    def status(self) -> int:
        return self._response.status if self._response is not None else 0

    def wanted_pause(self) -> float:
        """Return the seconds a busy server asks for, 0 if it does not say."""
        said = self._response.getheader("Retry-After") if self._response is not None else None
        try:
            return max(0.0, float(said or 0))
        except ValueError:
            return 0.0

    def text(self) -> str:
        """Return a document, or the beginning of one that is too long; empty if it breaks off."""
        if self._response is None:
            return ""
        try:
            body = self._response.read(_MOST_DOCUMENT_BYTES)
        except (OSError, HTTPException, ValueError, BackendError):
            return ""
        return body.decode("utf-8", "replace")

    def events(self, url: str) -> Iterator[Event]:
        """Yield the events of an answer until it says that it is done."""
        count = 0
        try:
            for line in self._lines():
                data = line.strip()
                if data == "data: [DONE]":
                    return
                if data.startswith("data:"):
                    count += 1
                    self._patience.hear()
                    yield read_event(data.removeprefix("data:"), url, self._key)
        except TimeoutError as error:
            raise ServerLostError(
                f"{url} {self._patience.describe()} in the middle of an answer (after {count} "
                "pieces). Ask again; if it is only slow, wait longer with --llm-timeout (for the "
                "next piece) or --llm-deadline (for all of it)."
            ) from error
        except (OSError, HTTPException, ValueError) as error:
            raise _broken_off(url, count, shown(str(error), self._key)) from error
        raise _broken_off(url, count, "the connection was closed")

    def _lines(self) -> Iterator[str]:
        if self._response is None:
            return
        while line := self._response.readline(_MOST_LINE_BYTES):
            if len(line) == _MOST_LINE_BYTES:
                raise ValueError(f"a line is longer than {_MOST_LINE_BYTES} bytes")
            yield line.decode("utf-8")


def _broken_off(url: str, count: int, reason: str) -> ServerLostError:
    return ServerLostError(
        f"{url} broke off in the middle of an answer, after {count} pieces ({reason}). The "
        "conversation is unchanged: ask again. If it happens again, look at the server's log."
    )
