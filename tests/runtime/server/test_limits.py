"""What a client cannot do: ask without a key, too much, too long, for somebody else or for ever."""

from __future__ import annotations

import http.client
import io
import json
import logging
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import openai
import pytest
from PIL import Image

from engines.bundle import Bundle
from engines.errors import OptionError
from engines.secret import Secret
from runtime.backends.context import Context
from runtime.server import connections
from runtime.server.options import Listening
from tests.runtime.server.conftest import Served, asking, picture, serving

ASK: dict[str, Any] = {"model": "tiny", "messages": asking("Hello", picture(1)), "max_tokens": 50}
PATIENCE_S = 30


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Answers stop before their second token until it is set."""
    opened = threading.Event()
    decode = Context.decode

    def waiting(self: Context, token: int) -> Any:
        opened.wait(PATIENCE_S)
        return decode(self, token)

    monkeypatch.setattr(Context, "decode", waiting)
    yield opened
    opened.set()


@contextmanager
def serving_tiny(bundle: Bundle, **options: Any) -> Iterator[Served]:
    with serving(bundle.root, port=0, threads=1, **options) as served:
        yield served


def metric(served: Served, name: str, **headers: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE_S)
    connection.request("GET", "/metrics", headers=headers)
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.01)


def in_background(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    done: list[Any] = []

    def run() -> None:
        try:
            done.append(work())
        except openai.OpenAIError as error:
            done.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, done


def raw_request(body: dict[str, Any], **headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: 127.0.0.1"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def test_a_full_queue_says_when_to_come_back(
    language_bundle: Bundle, gate: threading.Event
) -> None:
    with serving_tiny(language_bundle, queue=1) as served:
        client = served.client()
        first, answers = in_background(lambda: client.chat.completions.create(**ASK))
        wait_until(lambda: metric(served, "foveate_in_flight ") == 1)
        with pytest.raises(openai.RateLimitError) as told:
            client.chat.completions.create(**ASK)
        assert int(told.value.response.headers["retry-after"]) >= 1
        assert told.value.body["code"] == "queue_full"
        assert client.models.list().data  # what costs nothing is answered
        gate.set()
        first.join()
        assert answers[0].choices[0].message.content
        # The official client comes back by itself.
        again = served.client(max_retries=3).chat.completions.create(**ASK)
        assert again.choices[0].message.content == answers[0].choices[0].message.content


def test_bodies_that_are_large_together_are_refused(language_bundle: Bundle) -> None:
    """Each has room alone; what they may take is counted before they are read."""
    with serving_tiny(language_bundle, max_body_bytes=10_000) as served:
        head = raw_request(ASK).split(b"Content-Length")[0] + b"Content-Length: 10000\r\n\r\n"
        with ExitStack() as stack:
            for number in range(16):
                address = ("127.0.0.1", served.port)
                connection = stack.enter_context(socket.create_connection(address))
                connection.sendall(head)
                wait_until(lambda: metric(served, "foveate_in_flight ") == number + 1)  # noqa: B023
            with pytest.raises(openai.RateLimitError, match="--max-body"):
                served.client().chat.completions.create(**ASK)
        wait_until(lambda: metric(served, "foveate_in_flight ") == 0)
        assert served.client().chat.completions.create(**ASK).choices[0].message.content


def test_many_at_once_are_all_answered_alike(language_bundle: Bundle) -> None:
    with serving_tiny(language_bundle, batch=4, parallel=2, conversations=3) as served:
        client = served.client()
        asks = [{**ASK, "messages": asking("Hello", picture(seed))} for seed in range(6)]
        alone = [client.chat.completions.create(**ask).choices[0].message.content for ask in asks]
        served.service.remembered.most_bytes = 0  # every picture is encoded again
        threads = [
            in_background(lambda ask=ask: client.chat.completions.create(**ask)) for ask in asks * 4
        ]
        for thread, _ in threads:
            thread.join()
        together = [done[0].choices[0].message.content for _, done in threads]
        assert together == alone * 4
        assert len(served.service.answering.caches) == 3
        assert served.service.answering.caches.evicted > 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_deadline_ends_an_answer(
    language_bundle: Bundle, gate: threading.Event, stream: bool
) -> None:
    with serving_tiny(language_bundle) as served:
        client = served.client()
        with pytest.raises(openai.APIError) as told:
            completion = client.chat.completions.create(
                **ASK, stream=stream, extra_body={"deadline_s": 0.5}
            )
            list(completion)
        assert told.value.body["code"] == "deadline_exceeded"
        gate.set()
        wait_until(lambda: metric(served, "foveate_in_flight ") == 0)
        assert client.chat.completions.create(**ASK).choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_answer(
    language_bundle: Bundle, gate: threading.Event, stream: bool
) -> None:
    with serving_tiny(language_bundle, max_tokens=400) as served:
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(raw_request({**ASK, "max_tokens": 400, "stream": stream}))
            wait_until(lambda: metric(served, "foveate_in_flight ") == 1)
            if stream:
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        wait_until(lambda: metric(served, "foveate_in_flight ") == 0)
        wait_until(lambda: metric(served, "foveate_cancelled_total ") == 1)
        gate.set()
        assert served.client().chat.completions.create(**ASK).choices[0].message.content
        # Of the answer nobody waited for, no token was counted.
        assert metric(served, 'foveate_tokens_total{kind="answer"}') == 50


def test_half_closed_and_broken_connections_leave_nothing_behind(language_bundle: Bundle) -> None:
    with serving_tiny(language_bundle) as served:
        whole = raw_request({**ASK, "stream": True})
        for sent in (
            b"",
            b"GET",
            whole[:40],
            whole[:-30],
            whole,
            b"\x16\x03\x01\x02\x00",
            b"\0" * 99,
        ):
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(PATIENCE_S)
                while connection.recv(65536):
                    pass
        wait_until(lambda: metric(served, "foveate_in_flight ") == 0)
        assert metric(served, 'foveate_requests_total{path="/v1/chat/completions",status="5') == 0
        assert served.client().chat.completions.create(**ASK).choices[0].message.content


def test_slow_senders_are_cut_off(language_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_S", 0.3)
    with serving_tiny(language_bundle, body_s=0.3) as served:
        idle = socket.create_connection(("127.0.0.1", served.port))
        half = socket.create_connection(("127.0.0.1", served.port))
        half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127")
        body = socket.create_connection(("127.0.0.1", served.port))
        body.sendall(raw_request(ASK)[:-100])
        for connection in (idle, half, body):
            connection.settimeout(PATIENCE_S)
        assert body.recv(1000).startswith(b"HTTP/1.1 408")
        for connection in (idle, half):
            with suppress(ConnectionResetError):
                assert connection.recv(1000) == b""
        wait_until(lambda: metric(served, "foveate_in_flight ") == 0)
        for connection in (idle, half, body):
            connection.close()


def test_who_does_not_read_is_cut_off(
    language_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_tiny(language_bundle, body_s=0.5, deadline_s=0.5) as served:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(PATIENCE_S)
            connection.connect(("127.0.0.1", served.port))
            with pytest.raises(OSError):  # it is closed while we still ask, or before we read all
                for _ in range(2000):
                    connection.sendall(
                        b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50
                    )
        assert served.client().models.list().data


def test_a_key_is_asked_for(language_bundle: Bundle) -> None:
    with serving_tiny(language_bundle, api_key=Secret("Grüße-key")) as served:
        for wrong in ("none", "Gr", "x" * 10_000):
            with pytest.raises(openai.AuthenticationError) as told:
                served.client(api_key=wrong).chat.completions.create(**ASK)
            assert told.value.body["code"] == "invalid_api_key"
        for path, status in (
            ("/v1/models", 401),
            ("/metrics", 401),
            ("/docs", 401),
            ("/v1/health/live", 200),
            ("/v1/health/ready", 200),
            ("/static/reference.css", 200),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", served.port)
            connection.request("GET", path)
            assert connection.getresponse().status == status, path
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request(
            "GET", "/v1/models", headers={"Authorization": "Bearer Grüße-key".encode("latin-1")}
        )
        assert connection.getresponse().status == 200


def test_another_host_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "robot.local"):
        with pytest.raises(OptionError, match="no key is set"):
            Listening(host=host)
        Listening(host=host, api_key=Secret("key"))
    with pytest.raises(OptionError, match="line break"):
        Listening(api_key=Secret("key\n"))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "[::1"}, 400),
    ],
)
def test_other_names_and_other_sites_are_refused(
    talker: Served, headers: dict[str, str], status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", talker.port)
    connection.request("GET", "/v1/models", headers=headers)
    response = connection.getresponse()
    assert response.status == status
    assert "access-control-allow-origin" not in {name.lower() for name in response.headers}


def bomb() -> bytes:
    """A PNG of 30 million pixels in a few bytes, as a compressor of rows of zeros makes it."""
    file = io.BytesIO()
    Image.new("1", (6000, 5000)).save(file, "PNG")
    return file.getvalue()


def test_sizes_are_limited(language_bundle: Bundle) -> None:
    with serving_tiny(language_bundle, max_body_bytes=20_000, max_pixels=10_000) as served:
        client = served.client()
        with pytest.raises(openai.APIStatusError) as told:
            client.chat.completions.create(**{**ASK, "messages": asking("a" * 30_000)})
        assert told.value.status_code == 413
        for file in (bomb(), picture(1, 10_001, 1)[:14_000]):
            with pytest.raises(openai.BadRequestError, match="expected at most 10,000"):
                client.chat.completions.create(**{**ASK, "messages": asking("a", file)})
        chunked = http.client.HTTPConnection("127.0.0.1", served.port)
        chunked.request(
            "POST",
            "/encode",
            iter([b"x" * 15_000, b"x" * 15_000]),
            {"Content-Type": "image/png"},
            encode_chunked=True,
        )
        assert chunked.getresponse().status == 413


def test_deep_and_odd_json_is_refused(talker: Served) -> None:
    for body in (
        b"",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        b'{"model": "\\ud800"}',
        b"null",
        b"NaN",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 1e999}',
        zlib.compress(b"{}"),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", talker.port)
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        assert response.status == 400, body[:20]
        assert json.loads(response.read())["error"]["message"]


def test_a_simple_form_of_another_site_is_refused(talker: Served) -> None:
    """Browsers send these types without asking."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        for path in ("/v1/chat/completions", "/encode"):
            connection = http.client.HTTPConnection("127.0.0.1", talker.port)
            connection.request("POST", path, json.dumps(ASK), {"Content-Type": kind})
            assert connection.getresponse().status == 415


def test_logs_hold_no_pictures_questions_or_keys(
    language_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "runtime")
    caplog.set_level(logging.DEBUG, "uvicorn")
    with serving_tiny(language_bundle, api_key=Secret("hush-hush")) as served:
        client = served.client(api_key="hush-hush")
        client.chat.completions.create(**{**ASK, "messages": asking("my-secret", picture(1))})
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**ASK, extra_body={"visual_tokens": 9999})
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("my-secret")
    text = caplog.text
    assert "/v1/chat/completions 200" in text
    for hidden in ("hush", "my-secret", "base64", "iVBORw0KGgo"):
        assert hidden not in text
