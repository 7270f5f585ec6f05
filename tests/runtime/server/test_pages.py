"""The files of the live page: whole, and with nothing in them that its policy forbids."""

from __future__ import annotations

import http.client
import re

import pytest

from runtime.server.pages import STATIC
from tests.runtime.server.conftest import Served

FILES = sorted(file.name for file in STATIC.iterdir())


def fetch(served: Served, path: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    headers = {name.lower(): value for name, value in response.headers.items()}
    return response.status, response.read(), headers


@pytest.mark.parametrize("path", ["/", "/docs", *(f"/static/{name}" for name in FILES)])
def test_every_file_has_the_policy(server: Served, path: str) -> None:
    status, body, headers = fetch(server, path)
    assert status == 200 and body
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert "http" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    if path.endswith(".js"):
        assert "javascript" in headers["content-type"]


def test_nothing_is_inline_or_from_elsewhere() -> None:
    page = (STATIC / "index.html").read_text("utf-8")
    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=", page) == []
    linked = re.findall(r'\b(?:src|href)="([^"]+)"', page)
    assert all(link.startswith("static/") for link in linked)
    for file in STATIC.iterdir():
        text = file.read_text("utf-8")
        outside = re.findall(
            r"""(?:url\(|import\s+["']|from\s+["']|fetch\(["'])\s*["']?\w+:""", text
        )
        assert outside == [], file.name


def test_every_module_and_style_is_used() -> None:
    reached, waiting = set(), ["index.html"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        text = (STATIC / name).read_text("utf-8")
        found = re.findall(r'(?:static/|from "\./)([\w.]+)', text)
        assert all((STATIC / one).is_file() for one in found), name
        waiting += [one for one in found if one not in reached]
    assert reached | {"reference.css"} == set(FILES)
