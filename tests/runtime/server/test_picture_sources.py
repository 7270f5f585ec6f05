"""Pictures from other hosts: only those that are allowed, and never where they could not go."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from engines.errors import OptionError
from runtime.server.picture_sources import PictureSources, check_allowed
from runtime.server.refusals import RefusalError
from tests.runtime.server.conftest import picture

FILE = picture(1)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))  # type: ignore[attr-defined]
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture.png")
            self.end_headers()
            return
        self.send_response(200 if self.path.startswith("/picture") else 404)
        self.end_headers()
        if self.path == "/picture-large":
            self.wfile.write(b"x" * 300_000)
        else:
            self.wfile.write(FILE)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def host() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def code_of(sources: PictureSources, url: str) -> str | None:
    with pytest.raises(RefusalError) as told:
        sources.read(url)
    assert told.value.status == 400
    return told.value.code


def test_an_allowed_host_is_asked_for_the_path(host: ThreadingHTTPServer) -> None:
    port = host.server_address[1]
    sources = PictureSources((f"127.0.0.1:{port}",))
    assert sources.read(f"http://127.0.0.1:{port}/picture.png?size=2#part") == FILE
    assert host.asked == [("/picture.png?size=2", f"127.0.0.1:{port}")]  # type: ignore[attr-defined]


def test_others_are_not_asked(host: ThreadingHTTPServer) -> None:
    port = host.server_address[1]
    address = f"127.0.0.1:{port}"
    for allowed in ((), ("127.0.0.1",), ("localhost", "127.0.0.1:1"), (f"127.0.0.2:{port}",)):
        sources = PictureSources(allowed)
        assert code_of(sources, f"http://{address}/picture.png") == "url_not_allowed"
    sources = PictureSources((address,))
    for url in (
        f"http://localhost:{port}/picture.png",
        f"http://127.1:{port}/picture.png",
        f"http://2130706433:{port}/picture.png",
        f"http://[::ffff:127.0.0.1]:{port}/picture.png",
        f"http://127.0.0.1.:{port}/picture.png",
    ):
        assert code_of(sources, url) == "url_not_allowed", url
    assert code_of(sources, f"http://{address}@evil.example/") == "invalid_url"
    assert code_of(sources, f"http://{address}/a\nHost: evil") == "invalid_url"
    assert host.asked == []  # type: ignore[attr-defined]


def test_a_redirect_is_not_followed(host: ThreadingHTTPServer) -> None:
    port = host.server_address[1]
    sources = PictureSources((f"127.0.0.1:{port}",))
    assert code_of(sources, f"http://127.0.0.1:{port}/moved") == "url_failed"
    assert code_of(sources, f"http://127.0.0.1:{port}/none") == "url_failed"
    assert len(host.asked) == 2  # type: ignore[attr-defined]


def test_a_picture_that_is_too_large_is_not_read_to_its_end(host: ThreadingHTTPServer) -> None:
    port = host.server_address[1]
    sources = PictureSources((f"127.0.0.1:{port}",), most_bytes=1000)
    assert code_of(sources, f"http://127.0.0.1:{port}/picture-large") == "url_failed"


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.5", "169.254.169.254", "::1", "fe80::1", "0.0.0.0"]
)
def test_a_name_may_not_lead_into_a_private_network(address: str) -> None:
    """Nor may one of several addresses."""
    for found in ([address], ["93.184.216.34", address]):
        sources = PictureSources(("cdn.example",), resolve=lambda *_, found=found: found)
        assert code_of(sources, "http://cdn.example/x.png") == "url_not_allowed"


def test_the_address_that_was_checked_is_the_one_that_is_asked(
    host: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def connect(address: tuple[str, int], *_: object) -> socket.socket:
        asked.append(address)
        return socket.create_connection(host.server_address)  # type: ignore[arg-type]

    monkeypatch.setattr("runtime.server.picture_sources._connect", connect)
    sources = PictureSources(("cdn.example",), resolve=lambda *_: ["93.184.216.34"])
    assert sources.read("http://cdn.example/picture.png") == FILE
    assert asked == [("93.184.216.34", 80)]
    assert host.asked == [("/picture.png", "cdn.example")]  # type: ignore[attr-defined]


def test_a_silent_host_does_not_hold_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.picture_sources._FETCH_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        sources = PictureSources((f"127.0.0.1:{port}",))
        started = time.monotonic()
        assert code_of(sources, f"http://127.0.0.1:{port}/x.png") == "url_failed"
        assert time.monotonic() - started < 30


def test_hosts_are_checked_when_the_server_starts() -> None:
    good = ("cdn.example.org", "10.0.0.5:8080", "[::1]:80")
    assert check_allowed(good) == good
    for bad in ("http://cdn.example.org", "a/b", "", "*", "host:port"):
        with pytest.raises(OptionError, match="without http://"):
            check_allowed([bad])
