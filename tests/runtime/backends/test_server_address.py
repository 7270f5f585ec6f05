"""Addresses that are read; those that are refused are in tests/faults/test_servers.py."""

from __future__ import annotations

import pytest

from runtime.backends.server_address import ServerAddress, read_address


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000/v1", ServerAddress(False, "127.0.0.1", 8000, "/v1")),
        ("http://robot.local", ServerAddress(False, "robot.local", 80, "/v1")),
        ("https://host/llm/", ServerAddress(True, "host", 443, "/llm/v1")),
        ("http://[::1]/v1/", ServerAddress(False, "::1", 80, "/v1")),
        ("http://[::1]:9", ServerAddress(False, "::1", 9, "/v1")),
    ],
)
def test_an_address_is_read(url: str, address: ServerAddress) -> None:
    assert read_address(url) == address
