"""A browser for the tests of this folder, and a server that it asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.runtime.server.conftest import POCKET, Served

if TYPE_CHECKING:
    from tests.runtime.server.page.browser import LivePage

CAMERA_PICTURE = POCKET / "test" / "00003.png"


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePage]:
    """One Chromium for all tests; its camera shows `CAMERA_PICTURE`."""
    from tests.runtime.server.page.browser import chromium, write_camera_file

    place = tmp_path_factory.mktemp("chromium")
    camera = place / "camera.mjpeg"
    write_camera_file(camera, CAMERA_PICTURE)
    with chromium(place / "profile", camera) as page:
        yield page


@pytest.fixture
def page(browser: LivePage, server: Served) -> Iterator[LivePage]:
    """The page of the pocket server, opened anew; it must not have complained in the end."""
    browser.look()
    browser.connected(server.url)
    yield browser
    assert browser.complaints() == []
    asked = browser.requests()
    assert all(address.startswith(f"{server.url}/") for _, address, _ in asked)
