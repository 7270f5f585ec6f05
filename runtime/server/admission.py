"""Decide who may ask, and how many at once, before anything of a request's body is read.

The order is: is this server meant (the Host header, against DNS rebinding), does another web site
ask (the Origin header), is the key right, is there room; and then, is the body small and quick
enough.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from engines.secret import Secret
from runtime.server.counters import Counters
from runtime.server.options import Limits, Listening
from runtime.server.refusals import RefusalError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

WORK = ("/v1/chat/completions", "/encode")
"""Paths that take a place in the queue."""
_OPEN = ("/v1/health/live", "/v1/health/ready", "/", "/favicon.ico")
"""Paths that need no key: a probe and a page that is just being opened have none."""
_OPEN_FOLDER = "/static/"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_LONGEST_PAUSE_S = 60
_BODIES = 16
"""Bodies of the largest size that may be in memory at once; of smaller ones more."""
_GONE = 499
_log = logging.getLogger(__name__)


class Admission:
    """An ASGI application around another one.

    Attributes:
        inside: requests that wait or are answered.
        bytes_inside: of their bodies, at most.
        refused: how many found no room.
    """

    def __init__(self, app: App, listening: Listening, limits: Limits, counters: Counters) -> None:
        self.inside = 0
        self.bytes_inside = 0
        self.refused = 0
        self._app, self._limits, self._counters = app, limits, counters
        self._key = listening.key
        self._names = (*_LOOPBACK_NAMES, listening.host) if listening.on_loopback else None
        self._usual_s = 1.0  # of a request lately
        counters.watch("foveate_in_flight", "Requests being answered.", lambda: self.inside)
        counters.watch("foveate_refused", "Requests refused with 429.", lambda: self.refused)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        path = str(scope["path"])

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._let_in(scope, path, receive, noting)
        except RefusalError as refusal:
            await _answer(refusal, noting)
        finally:
            spent_s = time.monotonic() - started
            if status == _GONE:
                self._counters.cancelled.inc()
            known = getattr(scope.get("route"), "path", None) or (path if path in WORK else "other")
            self._counters.requests.labels(known, str(status)).inc()
            self._counters.seconds.labels(known).observe(spent_s)
            _log.info("%s %s %d %.0f ms", scope["method"], known, status, spent_s * 1e3)

    async def _let_in(self, scope: Scope, path: str, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        self._check_host(headers)
        if path not in _OPEN and not path.startswith(_OPEN_FOLDER):
            check_key(self._key, headers.get("authorization", ""))
        body = _Body(receive, self._limits, headers)
        if path not in WORK or scope["method"] != "POST":
            await self._app(scope, body.receive, send)
            return
        most_bytes = _BODIES * self._limits.max_body_bytes
        if self.inside >= self._limits.queue or self.bytes_inside + body.most_bytes > most_bytes:
            self.refused += 1
            raise self._no_room()
        self.inside += 1
        self.bytes_inside += body.most_bytes
        started = time.monotonic()
        try:
            await self._app(scope, body.receive, send)
        finally:
            self.inside -= 1
            self.bytes_inside -= body.most_bytes
            self._usual_s += 0.1 * (time.monotonic() - started - self._usual_s)

    def _check_host(self, headers: dict[str, str]) -> None:
        """Refuse names that a web page may have been made to lead here, and other sites' pages."""
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            origin = urlsplit(headers["origin"]).netloc if "origin" in headers else host
        except ValueError:
            raise RefusalError(
                400, "The Host or Origin header is not an address.", "bad_host"
            ) from None
        if self._names is not None and name not in self._names:
            raise RefusalError(
                403,
                f"This server answers to {', '.join(self._names[:2])} only, and was asked as "
                f"{name[:100]!r}. Use http://127.0.0.1, or start it with --host and --api-key.",
                "wrong_host",
            )
        if origin != host:
            raise RefusalError(
                403, "Pages of other web sites may not ask this server.", "wrong_origin"
            )

    def _no_room(self) -> RefusalError:
        wait_s = min(max(1, math.ceil(self._usual_s)), _LONGEST_PAUSE_S)
        return RefusalError(
            429,
            f"{self.inside} requests are being answered, as many as there is room for (--queue, "
            f"--max-body). Try again in {wait_s} s.",
            "queue_full",
            retry_after_s=wait_s,
        )


def check_key(key: Secret, header: str) -> None:
    """Compare the Authorization header with the key, in a time that does not depend on either.

    Raises:
        RefusalError: they differ.
    """
    if not key:
        return
    scheme, _, given = header.partition(" ")
    sent = given.strip().encode("latin-1", "replace")
    right = hmac.compare_digest(sent, key.reveal().encode("latin-1"))
    if not right or scheme.lower() != "bearer":
        raise RefusalError(
            401, "Send the server's key as `Authorization: Bearer KEY`.", "invalid_api_key"
        )


class _Body:
    """A request's body, of a bounded size and within a bounded time.

    Attributes:
        most_bytes: how large it may be, by what its headers say.
    """

    def __init__(self, receive: Receive, limits: Limits, headers: dict[str, str]) -> None:
        self._receive, self._limits = receive, limits
        self._until = time.monotonic() + limits.body_s
        self._bytes = 0
        self._whole = False
        told = headers.get("content-length", "")
        unknown = limits.max_body_bytes if "transfer-encoding" in headers else 0
        self.most_bytes = int(told) if told.isdecimal() else unknown
        if self.most_bytes > limits.max_body_bytes:
            raise self._too_large()

    async def receive(self) -> MutableMapping[str, Any]:
        """Return the next message of the request.

        Raises:
            RefusalError: the body is too large or too slow.
        """
        if self._whole:
            return await self._receive()
        left_s = self._until - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(left_s, 0.001))
        except asyncio.TimeoutError:
            raise RefusalError(
                408,
                f"The request's body did not arrive within {self._limits.body_s:g} s.",
                "body_too_slow",
            ) from None
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._limits.max_body_bytes:
            raise self._too_large()
        self._whole = not message.get("more_body", False)
        return message

    def _too_large(self) -> RefusalError:
        return RefusalError(
            413,
            f"The request's body has more than {self._limits.max_body_bytes:,} bytes. Send smaller "
            "pictures, or start the server with a larger --max-body.",
            "body_too_large",
        )


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def _answer(refusal: RefusalError, send: Send) -> None:
    """Send a refusal; headers were not sent yet, since only we raise refusals this far out."""
    import json

    body = json.dumps(refusal.document).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **{name.lower(): value for name, value in refusal.headers.items()},
    }
    await send(
        {
            "type": "http.response.start",
            "status": refusal.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
