"""A chat server over HTTP: requests that are repeated when that helps, answers as they are written.

Enters: an address and JSON documents. Leaves: the documents a server streams back. Everything that
can go wrong on the way ends in one paragraph: no server, a refused key or question, silence, a
connection that ends in the middle of an answer.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from engines.errors import BackendError, OptionError

_BUSY = (408, 429, 500, 502, 503, 504)
"""Statuses that another attempt may change."""
_LONGEST_PAUSE_S = 30.0
_SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class ServerOptions:
    """How to reach a server, and how patient to be with it.

    Attributes:
        url: its address with or without the path, for example ``http://192.168.1.5:8000/v1``.
        api_key: sent as a bearer token.
        model: the server's name for the language model; None takes the only one it has.
        connect_seconds: longest wait for a connection.
        silence_seconds: longest wait for the next piece of an answer, the first one included.
        attempts: how often a request is sent at most; never again once an answer has begun.
        pause_seconds: wait before the second attempt; it doubles with every further one.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    connect_seconds: float = 5.0
    silence_seconds: float = 60.0
    attempts: int = 4
    pause_seconds: float = 0.5

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(
                f"{self.url!r} is not the address of a server: expected one such as "
                "http://127.0.0.1:8000/v1. Give it with --llm-url."
            )
        numbers = (self.connect_seconds, self.silence_seconds, self.attempts)
        if min(numbers) <= 0 or self.pause_seconds < 0:
            raise OptionError(
                "connect_seconds, silence_seconds and attempts must be more than 0 and "
                "pause_seconds 0 or more."
            )


class ChatServer:
    """One server that speaks OpenAI's Chat Completions.

    Attributes:
        options: how to reach it.
    """

    def __init__(self, options: ServerOptions, sleep: Callable[[float], None] = time.sleep) -> None:
        self.options = options
        self._sleep = sleep
        parts = urlsplit(options.url)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port
        path = parts.path.rstrip("/")
        self._path = path if path.endswith("/v1") else f"{path}/v1"
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if options.api_key:
            self._headers["Authorization"] = f"Bearer {options.api_key}"

    def models(self) -> list[dict[str, Any]]:
        """Return what the server says of the models it serves.

        Raises:
            BackendError: no server, or not one of this kind.
        """
        with _Exchange(self._send("GET", "models", None)) as exchange:
            document = exchange.document()
        models = document.get("data")
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            raise BackendError(
                f"{self.options.url} answers, but not with a list of models. Expected a server "
                "that speaks OpenAI's API, such as `vllm serve`."
            )
        return models

    def stream(self, request: dict[str, Any]) -> Generator[dict[str, Any]]:
        """Ask, and yield the documents of the answer as they come; close the iterator to cancel.

        Raises:
            BackendError: it cannot be answered; the message says why and what to do.
        """
        body = json.dumps({**request, "stream": True}, allow_nan=False).encode()
        with _Exchange(self._send("POST", "chat/completions", body)) as exchange:
            yield from exchange.events(self.options)

    def _send(self, method: str, name: str, body: bytes | None) -> tuple[HTTPConnection, Any]:
        """Send until the server begins to answer; return its connection and response."""
        for attempt in range(1, self.options.attempts + 1):
            spread = random.uniform(0.8, 1.2)  # noqa: S311 - robots should not all come back at once
            pause = self.options.pause_seconds * 2 ** (attempt - 1) * spread
            connection = self._connection()
            try:
                connection.connect()
                response = self._request(connection, method, name, body)
            except (OSError, HTTPException) as error:
                asked = connection.sock is not None
                connection.close()
                problem = self._explain_silence(error, attempt)
                if asked and isinstance(error, TimeoutError):
                    raise problem from error  # another attempt would add to its load
            else:
                if response.status < 300:
                    return connection, response
                with _Exchange((connection, response)) as exchange:
                    problem = self._explain_refusal(response.status, exchange.text())
                if response.status not in _BUSY:
                    raise problem
                pause = max(pause, _wanted_pause(response))
            if attempt == self.options.attempts:
                raise problem
            self._sleep(min(pause, _LONGEST_PAUSE_S))
        raise problem

    def _connection(self) -> HTTPConnection:
        kind = HTTPSConnection if self._secure else HTTPConnection
        return kind(self._host, self._port, timeout=self.options.connect_seconds)

    def _request(
        self, connection: HTTPConnection, method: str, name: str, body: bytes | None
    ) -> HTTPResponse:
        connection.sock.settimeout(self.options.silence_seconds)
        connection.request(method, f"{self._path}/{name}", body, self._headers)
        return connection.getresponse()

    def _explain_silence(self, error: Exception, attempt: int) -> BackendError:
        times = "once" if attempt == 1 else f"{attempt} times"
        if isinstance(error, TimeoutError):
            return BackendError(
                f"{self.options.url} did not answer in time, asked {times} (limits: "
                f"{self.options.connect_seconds:g} s to connect, {self.options.silence_seconds:g} "
                "s of silence). The server is overloaded or the network slow: lower its load, or "
                "wait longer with --llm-timeout."
            )
        return BackendError(
            f"No answer from {self.options.url}, asked {times} ({type(error).__name__}: {error}). "
            "Check that the server runs and the address and port are right, or answer on the robot "
            "with --backend ort."
        )

    def _explain_refusal(self, status: int, body: str) -> BackendError:
        said = _server_message(body)
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
            return BackendError(
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


class _Exchange:
    """One response being read; leaving it closes the connection, which ends the server's work."""

    def __init__(self, opened: tuple[HTTPConnection, HTTPResponse]) -> None:
        self._connection, self._response = opened

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def text(self) -> str:
        try:
            return self._response.read().decode("utf-8", "replace")
        except (OSError, HTTPException):
            return ""

    def document(self) -> dict[str, Any]:
        try:
            read = json.loads(self.text())
        except ValueError:
            read = None
        return read if isinstance(read, dict) else {}

    def events(self, options: ServerOptions) -> Iterator[dict[str, Any]]:
        """Yield the documents of an event stream until it says that it is done."""
        count = 0
        try:
            for line in self._response:
                data = line.decode("utf-8").strip()
                if data == "data: [DONE]":
                    return
                if data.startswith("data:"):
                    count += 1
                    yield _read_event(data.removeprefix("data:"), options)
        except TimeoutError as error:
            raise BackendError(
                f"{options.url} fell silent for {options.silence_seconds:g} s in the middle of an "
                f"answer (after {count} pieces). Ask again; if it is only slow, wait longer with "
                "--llm-timeout."
            ) from error
        except (OSError, HTTPException, UnicodeDecodeError) as error:
            raise _broken_off(options, count, str(error)) from error
        raise _broken_off(options, count, "the connection was closed")


def _broken_off(options: ServerOptions, count: int, reason: str) -> BackendError:
    return BackendError(
        f"{options.url} broke off in the middle of an answer, after {count} pieces ({reason}). The "
        "conversation is unchanged: ask again. If it happens again, look at the server's log."
    )


def _read_event(data: str, options: ServerOptions) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError as error:
        raise _broken_off(options, 0, f"it sent {data[:80]!r}, which is not JSON") from error
    if not isinstance(document, dict):
        raise _broken_off(options, 0, f"it sent {data[:80]!r}, expected a JSON object")
    if "error" in document:
        raise BackendError(
            f"{options.url} failed in the middle of an answer ({_server_message(data)}). Ask "
            "again; if it happens again, look at the server's log."
        )
    return document


def _server_message(body: str) -> str:
    """Return a server's own words from an error document, or the beginning of what it sent."""
    try:
        error = json.loads(body)["error"]
        said = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        said = body
    words = " ".join(str(said).split()) or "no reason given"
    return words if len(words) <= _SHOWN_CHARACTERS else words[:_SHOWN_CHARACTERS] + " ..."


def _wanted_pause(response: HTTPResponse) -> float:
    """Return the seconds a busy server asks for, 0 if it does not say."""
    try:
        return max(0.0, float(response.getheader("Retry-After", "0")))
    except ValueError:
        return 0.0
