"""10,000 generated requests, right and wrong ones, against a real server: it answers all of them.

Run by `make test-serve-fuzz`. The requests come from the server's own OpenAPI document.
"""

from __future__ import annotations

import http.client
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from engines.bundle import Bundle
from tests.runtime.server.conftest import Served, asking, data_uri, picture, serving

pytestmark = [pytest.mark.fuzz]

REQUESTS = int(os.environ.get("FOVEATE_FUZZ_REQUESTS", "10000"))
_PER_ROUND = 200
_PICTURES = (
    data_uri(picture(1)),
    data_uri(picture(2, 1, 500)),
    data_uri(picture(3)[:-40]),
    data_uri(b"GIF89a"),
    "data:,",
    "http://127.0.0.1:1/x.png",
)


@pytest.fixture(scope="module")
def fuzzed(language_bundle: Bundle) -> Iterator[Served]:
    """A server whose answers are short, so that most of the time goes into requests."""
    with serving(language_bundle.root, port=0, threads=1, max_tokens=8) as served:
        yield served


def test_no_request_is_a_crash_or_a_server_error(fuzzed: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/chat/completions", "/encode"}
    sent: Counter[str] = Counter()
    problems: list[str] = []
    for round_ in count():
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                examples = _PER_ROUND if operation.method == "post" else _PER_ROUND // 20
                _send(operation, mode, examples, round_, sent, problems)
        if sent.total() >= REQUESTS or problems:
            break
    print(f"\n{sent.total()} requests: {dict(sorted(sent.items()))}")
    assert not problems, problems[:10]
    assert sent["POST 200"]
    assert fuzzed.thread.is_alive()
    completion = fuzzed.client().chat.completions.create(
        model="tiny", messages=asking("Hello", picture(1)), max_tokens=5
    )
    assert completion.usage.completion_tokens == 5


def _send(
    operation: Any,
    mode: GenerationMode,
    examples: int,
    round_: int,
    sent: Counter[str],
    problems: list[str],
) -> None:
    session = requests.Session()

    @seed(round_)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode), strategies.sampled_from(_PICTURES))
    def one(case: Any, shown: str) -> None:
        if isinstance(case.body, dict):
            _show(case.body.get("messages"), shown)
        try:
            response = case.call(session=session, timeout=120)
        except (requests.RequestException, OSError) as error:
            problems.append(f"{operation.label}: {type(error).__name__}: {error}"[:500])
            return
        sent[f"{operation.method.upper()} {response.status_code}"] += 1
        if response.status_code >= 500:
            problems.append(f"{operation.label}: {response.status_code} {response.text[:300]}")

    with suppress(Unsatisfiable):  # some routes have no wrong request
        one()


def _show(messages: Any, picture_url: str) -> None:
    """Put a picture where a generated message has an address that is none."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("image_url"), dict):
                part["image_url"]["url"] = picture_url


def test_raw_bytes_are_no_crash(fuzzed: Served) -> None:
    """Not even HTTP."""
    import random
    import socket

    draw = random.Random(1)
    start = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    )
    for _ in range(500):
        noise = bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
        whole = draw.choice([noise, start + b"\r\n" + noise, start + b"\r\n\r\n" + noise])
        with socket.create_connection(("127.0.0.1", fuzzed.port)) as connection:
            connection.sendall(whole)
    connection = http.client.HTTPConnection("127.0.0.1", fuzzed.port)
    connection.request("GET", "/v1/health/ready")
    assert connection.getresponse().status == 200
