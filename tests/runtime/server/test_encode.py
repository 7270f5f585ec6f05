"""`/encode`, the state of a server and its pages, over HTTP."""

from __future__ import annotations

import http.client
import json
import re
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load

from runtime.vision.encoder import VisionEncoder
from runtime.vision.pictures import load_picture
from tests.runtime.server.conftest import POCKET, Served

PICTURE = POCKET / "test" / "00003.png"


def ask(
    served: Served, method: str, path: str, body: bytes = b"", kind: str = "image/png"
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request(method, path, body, {"Content-Type": kind})
    response = connection.getresponse()
    headers = {name.lower(): value for name, value in response.headers.items()}
    return response.status, response.read(), headers


@pytest.mark.parametrize("tokens", [16, 64, 576])
def test_a_picture_becomes_the_runtimes_tokens(server: Served, tokens: int) -> None:
    status, body, headers = ask(
        server, "POST", f"/encode?visual_tokens={tokens}", PICTURE.read_bytes()
    )
    assert status == 200
    sent = load(body)
    with VisionEncoder(server.service.bundle, threads=1, tokens=tokens) as encoder:
        seen = encoder.encode([load_picture(PICTURE)])
    assert sent["visual_tokens"].dtype == np.float16
    assert sent["visual_tokens"].shape == (tokens, 128)
    np.testing.assert_array_equal(sent["visual_tokens"], seen.tokens_of(0).astype(np.float16))
    np.testing.assert_array_equal(sent["patch_index"], seen.origin[0])
    np.testing.assert_array_equal(sent["assignment"], seen.assignment[0])
    assert headers["x-visual-tokens"] == str(tokens)
    assert re.search(r"encode;dur=\d", headers["server-timing"])


def test_as_json_it_tells_the_kept_patches(server: Served) -> None:
    status, body, _ = ask(
        server, "POST", "/encode?format=json&visual_tokens=16", PICTURE.read_bytes()
    )
    told = json.loads(body)
    assert status == 200
    assert told["visual_tokens"] == told["budget"] == 16
    rows, columns = told["patch_rows"], told["patch_columns"]
    made = {at for at, slot in enumerate(told["assignment"]) if slot >= 0}
    kept = {row * columns + column for row, column in told["kept"]}
    assert kept
    assert kept < made  # the rest merge several patches
    assert len(told["assignment"]) == rows * columns
    assert set(told["milliseconds"]) >= {"read", "preprocess", "encode"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/encode", b"", 400, "invalid_value"),
        ("/encode", b"no picture", 400, "invalid_value"),
        ("/encode?visual_tokens=17", PICTURE.name.encode(), 400, "unknown_budget"),
        ("/encode?visual_tokens=-1", b"", 400, "invalid_value"),
        ("/encode?format=xml", b"", 400, "invalid_value"),
        ("/nowhere", b"", 404, "not_found"),
        ("/v1/models", b"", 405, "not_found"),
    ],
)
def test_wrong_requests(server: Served, path: str, body: bytes, status: int, code: str) -> None:
    got, document, _ = ask(server, "POST", path, body)
    assert got == status
    assert json.loads(document)["error"]["code"] == code


def test_health_metadata_and_metrics(server: Served) -> None:
    assert ask(server, "GET", "/v1/health/live")[0] == 200
    status, body, _ = ask(server, "GET", "/v1/health/ready")
    assert (status, json.loads(body)) == (200, {"status": "ready"})
    told = json.loads(ask(server, "GET", "/v1/metadata")[1])
    assert [one["visual_tokens"] for one in told["budgets"]] == [64, 16, 576]
    assert told["budgets"][2]["accuracy"] > 0.9
    families = {
        family.name
        for family in text_string_to_metric_families(ask(server, "GET", "/metrics")[1].decode())
    }
    assert {"foveate_requests", "foveate_in_flight", "foveate_encoded_batch"} <= families


def test_the_pages_load_nothing_from_elsewhere(server: Served) -> None:
    status, page, headers = ask(server, "GET", "/docs")
    assert status == 200
    assert b"/v1/chat/completions" in page
    assert b"visual_tokens" in page
    loaded = re.findall(rb'(?:src|href)="?([^" >]+)', page)
    assert loaded
    assert all(address.startswith(b"/") for address in loaded)
    assert "default-src 'none'" in headers["content-security-policy"]
    document = json.loads(ask(server, "GET", "/openapi.json")[1])
    assert "ChatRequest" in document["components"]["schemas"]
    assert ask(server, "GET", "/")[0] in (200, 307)
    for path in ("/static/../service.py", "/static/%2e%2e/service.py", "/static/"):
        assert ask(server, "GET", path)[0] == 404


def test_a_defect_is_a_500_that_names_no_secret(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("the picture was iVBORw0KGgo")

    monkeypatch.setattr(server.service, "_decode", broken)
    status, body, _ = ask(server, "POST", "/encode", Path(PICTURE).read_bytes() + b" ")
    assert status == 500
    error = json.loads(body)["error"]
    assert error["code"] == "defect"
    assert "iVBOR" not in error["message"]
    monkeypatch.undo()
    assert ask(server, "POST", "/encode", PICTURE.read_bytes())[0] == 200
