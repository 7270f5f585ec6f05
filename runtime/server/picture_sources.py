"""Read the pictures of a request: from its data URIs, or from hosts that the server allows.

A host must be allowed by name. Redirects are not followed, a name must lead to public addresses
(a private one must itself be what is allowed), and the address that was checked is the one that is
asked.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, urlsplit

from engines.errors import BackendError
from runtime.backends.bounded_reading import Patience, read_response
from runtime.server.refusals import RefusalError

_DATA = re.compile(r"data:(?P<kind>[\w.+/-]*)(?P<options>(;[\w=.+-]+)*),", re.ASCII)
_PORTS = {"http": 80, "https": 443}
_VISIBLE = re.compile(r"[!-~]*")
_FETCH_S = 10.0
Resolve = Callable[[str, int], list[str]]
"""Returns the numeric addresses of a host and port."""
_connect = socket.create_connection


def _resolve(host: str, port: int) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclass(frozen=True)
class PictureSources:
    """Where pictures may come from.

    Attributes:
        allowed: hosts, as ``HOST`` or ``HOST:PORT``.
        most_bytes: of one picture that is fetched.
        resolve: finds a host's addresses.
    """

    allowed: tuple[str, ...] = ()
    most_bytes: int = 32_000_000
    resolve: Resolve = _resolve

    def read(self, url: str) -> bytes:
        """Return the bytes of a picture file.

        Raises:
            RefusalError: an address that is none, is not allowed or does not answer.
        """
        if url[:5].lower() == "data:":
            return _bytes_from_data(url)
        return self._fetch(url)

    def _fetch(self, url: str) -> bytes:
        parts, port = _split(url)
        host = parts.hostname or ""
        secure = parts.scheme == "https"
        if not self._allows(host, port, port == _PORTS[parts.scheme]):
            raise _refused(
                f"Pictures are not fetched from {host}:{port}. Send the picture as a data URI "
                "(data:image/jpeg;base64,...), or start the server with --allow-url.",
                "url_not_allowed",
            )
        address = self._public_address(host, port)
        kind = HTTPSConnection if secure else HTTPConnection
        connection: Any = kind(host, port, timeout=_FETCH_S)
        # The name is not looked up again: it might lead elsewhere the second time.
        connection._create_connection = lambda _, *rest: _connect((address, port), *rest)
        path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        try:
            return self._download(connection, path, host)
        except (OSError, HTTPException, ValueError, BackendError) as error:
            raise _refused(
                f"The picture could not be fetched from {host}:{port} ({type(error).__name__}). "
                "Send it as a data URI.",
                "url_failed",
            ) from error
        finally:
            connection.close()

    def _download(self, connection: Any, path: str, host: str) -> bytes:
        connection.connect()
        patience = Patience(_FETCH_S, _FETCH_S)
        patience.begin(self.most_bytes + (1 << 16))
        connection.request("GET", path, headers={"Accept": "image/*"})
        with read_response(connection.sock, "GET", patience) as response:
            if response.status != 200:
                raise _refused(
                    f"{host} answers {response.status} where a picture was expected; redirects are "
                    "not followed. Give the picture's final address, or send it as a data URI.",
                    "url_failed",
                )
            data = response.read(self.most_bytes + 1)
        if len(data) > self.most_bytes:
            raise _refused(
                f"The picture at {host} has more than {self.most_bytes:,} bytes. Scale it down.",
                "url_failed",
            )
        return data

    def _allows(self, host: str, port: int, usual: bool) -> bool:
        named = f"[{host}]" if ":" in host else host
        allowed = {one.lower() for one in self.allowed}
        return f"{named}:{port}" in allowed or (usual and named in allowed)

    def _public_address(self, host: str, port: int) -> str:
        """Return an address to ask, none of a private network but one that was allowed itself."""
        if _is_address(host):
            return host
        try:
            found = self.resolve(host, port)
        except OSError as error:
            raise _refused(f"{host} is not known ({error.strerror}).", "url_failed") from error
        if not found or not all(ipaddress.ip_address(one).is_global for one in found):
            raise _refused(
                f"{host} leads to an address that is not public. Send the picture as a data URI, "
                "or allow the address itself with --allow-url.",
                "url_not_allowed",
            )
        return found[0]


def _bytes_from_data(url: str) -> bytes:
    found = _DATA.match(url)
    if found is None or ";base64" not in (found["options"] or "").lower():
        raise _refused(
            "A picture's data URI must be base64: data:image/jpeg;base64,....", "invalid_data_uri"
        )
    try:
        return base64.b64decode(url[found.end() :].encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(
            f"A picture's data URI is not base64 ({error}). Encode the file's bytes with base64, "
            "without line breaks.",
            "invalid_data_uri",
        ) from None


def _split(url: str) -> tuple[SplitResult, int]:
    try:
        if not _VISIBLE.fullmatch(url) or len(url) > 8192:
            raise ValueError("it holds a blank or a character that is not ASCII, or is too long")
        parts = urlsplit(url)
        port = parts.port
        if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
            raise ValueError("expected http:// or https:// and a host, without a user name")
        return parts, port or _PORTS[parts.scheme]
    except ValueError as error:
        raise _refused(
            f"A picture's address cannot be used: {error}. Send the picture as a data URI "
            "(data:image/jpeg;base64,...).",
            "invalid_url",
        ) from None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def check_allowed(hosts: Iterable[str]) -> tuple[str, ...]:
    """Return hosts as `PictureSources` takes them.

    Raises:
        OptionError: one is not a host.
    """
    from engines.errors import OptionError

    for host in hosts:
        if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?", host, re.ASCII):
            raise OptionError(
                f"--allow-url {host}: expected a host such as cdn.example.org or 192.168.1.5:8080, "
                "without http:// and without a path."
            )
    return tuple(hosts)


def _refused(message: str, code: str) -> RefusalError:
    return RefusalError(400, message, code, "messages")
