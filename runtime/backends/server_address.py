"""Read the address of a server into host, port and path.

An address with a password or a query is refused, because messages show the address.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from engines.errors import OptionError

_PORTS = {"http": 80, "https": 443}
_VISIBLE = re.compile(r"[!-~]*")
_EXAMPLE = "expected one such as http://127.0.0.1:8000/v1. Give it with --llm-url."


@dataclass(frozen=True)
class ServerAddress:
    """Where a server listens.

    Attributes:
        secure: whether it speaks HTTPS.
        host: its name or number, without brackets.
        port: 1 to 65535.
        path: of its API, ending in ``/v1``.
    """

    secure: bool
    host: str
    port: int
    path: str


def read_address(url: str) -> ServerAddress:
    """Return what an address says.

    Raises:
        OptionError: it is none, or holds more than an address.
    """
    _refuse_more_than_an_address(url)
    problem = ""
    try:
        if not _VISIBLE.fullmatch(url):
            raise ValueError("it holds a blank, a line break or a character that is not ASCII")
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as error:  # of urlsplit, too: brackets, ports; of idna: the length of names
        problem = f" ({error})"
    else:
        if parts.scheme in _PORTS and host and port != 0:
            path = parts.path.rstrip("/")
            return ServerAddress(
                secure=parts.scheme == "https",
                host=host,
                port=port or _PORTS[parts.scheme],
                path=path if path.endswith("/v1") else f"{path}/v1",
            )
    raise OptionError(f"{url[:200]!r} is not the address of a server{problem}: {_EXAMPLE}")


def _refuse_more_than_an_address(url: str) -> None:
    """Refuse what may be secret, without showing it."""
    if "@" in url:
        raise OptionError(
            "The address of the server holds a user name or a password (an @), which messages "
            "would show. Give the key with --api-key or the environment variable FOVEATE_API_KEY."
        )
    if "?" in url or "#" in url:
        raise OptionError(
            "The address of the server goes on after its path (a ? or a #), which would not be "
            f"sent: {_EXAMPLE}"
        )
