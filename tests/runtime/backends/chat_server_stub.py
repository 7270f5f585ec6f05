"""A chat server on the loopback interface that does, request by request, what a test tells it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = {"data": [{"id": "tiny-llama", "max_model_len": 512}]}
Behaviour = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers with the server's next behaviour and keeps what it was asked."""

    server: Stub

    def do_GET(self) -> None:
        self.send_json(200, self.server.models)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.requests.append(json.loads(self.rfile.read(length)))
        self.server.keys.append(self.headers["Authorization"])
        script = self.server.script
        behaviour = script.pop(0) if len(script) > 1 else script[0]
        behaviour(self)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def send_json(self, status: int, document: object, **headers: str) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def send_event(self, document: object) -> None:
        text = document if isinstance(document, str) else json.dumps(document)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()


class Stub(ThreadingHTTPServer):
    """What a test reads and writes.

    Attributes:
        script: behaviours of the next questions; the last one stays.
        requests: the documents that were sent.
        keys: the Authorization header of each.
        models: what `/v1/models` says.
        cancelled: set when a client closed the connection before the end.
    """

    daemon_threads = True

    def __init__(self, *script: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models: object = MODELS
        self.cancelled = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: object) -> None:
        """A client that went away is part of the tests."""


@contextmanager
def serving(*script: Behaviour) -> Iterator[Stub]:
    stub = Stub(*(script or (answering("ok"),)))
    thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        stub.shutdown()
        thread.join()
        stub.server_close()


def piece(text: str, ids: list[int] | None = None, **ending: object) -> dict[str, Any]:
    """One event as vLLM sends it."""
    choice = {"index": 0, "delta": {"content": text}, "token_ids": ids, "finish_reason": None}
    return {"choices": [choice | ending]}


def answering(*texts: str, finish: str = "stop", stop_reason: object = None) -> Behaviour:
    """Stream these pieces and end properly."""

    def behave(handler: Handler) -> None:
        handler.begin_stream()
        for number, text in enumerate(texts):
            handler.send_event(piece(text, [10 + number]))
        handler.send_event(piece("", [2], finish_reason=finish, stop_reason=stop_reason))
        handler.send_event({"choices": [], "usage": {"prompt_tokens": 31}})
        handler.send_event("[DONE]")

    return behave


def refusing(status: int, message: str = "no", **headers: str) -> Behaviour:
    return lambda handler: handler.send_json(status, {"error": {"message": message}}, **headers)


def hanging_up(handler: Handler) -> None:
    """Close the connection before a word was said."""
    handler.close_connection = True


def breaking_off(*events: object) -> Behaviour:
    """Stream these events, then close the connection."""

    def behave(handler: Handler) -> None:
        handler.begin_stream()
        for event in events:
            handler.send_event(event)

    return behave


def silent_after(*texts: str, seconds: float = 2.0) -> Behaviour:
    """Stream these pieces, then say nothing for a while."""

    def behave(handler: Handler) -> None:
        if texts:
            handler.begin_stream()
        for text in texts:
            handler.send_event(piece(text))
        time.sleep(seconds)

    return behave


def endless(handler: Handler) -> None:
    """Stream until the client has gone."""
    handler.begin_stream()
    try:
        while True:
            handler.send_event(piece("again "))
            time.sleep(0.005)
    except OSError:
        handler.server.cancelled.set()
