"""10,000 generated requests, right and wrong ones, against a real server: it answers all of them.

Run by `make test-serve-fuzz`. The requests come from the server's own OpenAPI document.
"""

from __future__ import annotations

import http.client
import os
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import GenerationMode

from tests.runtime.server.conftest import Served, asking, picture

pytestmark = [pytest.mark.fuzz]

REQUESTS = int(os.environ.get("FOVEATE_FUZZ_REQUESTS", "10000"))


def test_no_request_is_a_crash_or_a_server_error(talker: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{talker.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    # Most of them go to the routes that do work.
    weights = {op: 8 if op.method == "post" else 1 for op in operations}
    total = sum(weights.values())
    statuses: Counter[int] = Counter()
    problems: list[str] = []
    for operation, weight in weights.items():
        share = REQUESTS * weight // total // 2 + 1
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            _send(operation, mode, share, talker, statuses, problems)
    print(f"\n{sum(statuses.values())} requests: {dict(statuses)}")
    assert not problems, problems[:10]
    assert sum(statuses.values()) >= REQUESTS * 0.9
    assert talker.thread.is_alive()
    completion = talker.client().chat.completions.create(
        model="tiny", messages=asking("Hello", picture(1)), max_tokens=5
    )
    assert completion.usage.completion_tokens == 5


def _send(
    operation: Any,
    mode: GenerationMode,
    share: int,
    talker: Served,
    statuses: Counter[int],
    problems: list[str],
) -> None:
    strategy = operation.as_strategy(generation_mode=mode)

    def one(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body and len(statuses) % 2:
            case.body["model"] = "tiny"
        try:
            response = case.call(timeout=60)
        except Exception as error:
            problems.append(f"{operation.label}: {type(error).__name__}: {error}")
            return
        statuses[response.status_code] += 1
        if response.status_code >= 500:
            problems.append(f"{operation.label}: {response.status_code} {response.text[:300]}")

    from hypothesis import given

    run = given(strategy)(one)
    try:
        settings(
            max_examples=share,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(run)()
    except Exception as error:
        if type(error).__name__ != "Unsatisfiable":
            raise


def test_raw_bytes_are_no_crash(talker: Served) -> None:
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
        with socket.create_connection(("127.0.0.1", talker.port)) as connection:
            connection.sendall(whole)
    connection = http.client.HTTPConnection("127.0.0.1", talker.port)
    connection.request("GET", "/v1/health/ready")
    assert connection.getresponse().status == 200
