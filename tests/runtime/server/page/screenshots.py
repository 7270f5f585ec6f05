"""Take the pictures of the live page that docs/ shows.

    python -m tests.runtime.server.page.screenshots build/pocket

The bundle is the bundled checkpoint's, with graphs of 16, 64 and all tokens.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.runtime.server.conftest import POCKET, serving
from tests.runtime.server.page.browser import LivePage, chromium

DOCS = Path(__file__).parents[4] / "docs"
PICTURE = POCKET / "test" / "00011.png"
ROUNDS = 9
SIZES = {"desktop": (1280, 960), "phone": (390, 844)}


def fill(page: LivePage) -> None:
    """Ask with every budget, so that there are medians, and compare at the end."""
    page.use_picture(PICTURE)
    page.all("input[value=in-turn]")[0].click()
    for stop in (2, 0, 1):
        page.set_budget(stop)
        for _ in range(ROUNDS):
            page.ask("List the objects from left to right.")
    page.driver.execute_script("document.activeElement.blur()")


def take(page: LivePage, name: str, width: int, height: int, dark: bool) -> None:
    """Save the whole page as a PNG of few colours."""
    page.look(dark=dark, width=width, height=height)
    whole = page.driver.execute_script("return document.documentElement.scrollHeight")
    page.look(dark=dark, width=width, height=max(height, whole))
    page.driver.execute_script("window.scrollTo(0, 0)")
    file = DOCS / f"{name}.png"
    page.driver.save_screenshot(str(file))
    with Image.open(file) as image:
        few = image.convert("RGB").quantize(
            256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
        )
    few.save(file, optimize=True)


def main() -> None:
    """Take all pictures."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        bundle = Path(sys.argv[1])
        with serving(bundle, port=0, threads=1) as served, chromium(profile) as page:
            page.connected(served.url)
            page.driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
            fill(page)
            for size, (width, height) in SIZES.items():
                for dark in (False, True):
                    name = f"live-page-{size}-{'dark' if dark else 'light'}"
                    take(page, name, width, height, dark)


if __name__ == "__main__":
    main()
