"""The page: one file that holds everything, runs nothing and escapes what comes from outside."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from engines.errors import OptionError
from engines.option_groups import spread
from export.verify import command
from tests.verified_bundles import change_weight, put_fp16, rewrite_bundle

main = spread(command.main)

HOSTILE = "<img src=x onerror=alert(1)>.png"


class Elements(HTMLParser):
    """Collects tags and attributes, and sees that every element is closed."""

    VOID = ("meta", "br", "img", "line", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += " ".join(data.split()) + " "


@pytest.fixture(scope="module")
def page(verified_bundle, language_checkpoint, photographs, tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("page")
    pictures = root / "pictures"
    pictures.mkdir()
    shutil.copy2(photographs / "coffee.png", pictures / HOSTILE)
    shutil.copy2(photographs / "chelsea.png", pictures / "cat.png")
    half = rewrite_bundle(verified_bundle, root / "half", put_fp16(verified_bundle))
    shuffle = change_weight("tower.layers.1.attention.q_proj", lambda values: values[::-1] * 40)
    damaged = rewrite_bundle(verified_bundle, root / "damaged", shuffle)
    code = main(
        bundles=[verified_bundle, half, damaged],
        model=str(language_checkpoint),
        images=pictures,
        engine="ort",
        max_tokens=3,
        threads=1,
        html=root / "out" / "page.html",
    )
    assert code == 1
    return (root / "out" / "page.html").read_text("utf-8")


def test_it_is_well_formed_and_needs_nothing_beside_it(page):
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "link", "iframe", "object", "base"}
    for tag, attributes in elements.found:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        source = attributes.get("src") or attributes.get("href") or "data:"
        assert source.startswith("data:image/jpeg;base64,") or source == "data:"
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert "default-src 'none'" in page


def test_names_are_escaped(page):
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;.png" in page


def test_it_says_what_was_found(page):
    elements = Elements()
    elements.feed(page)
    assert "tiny-llama: 1 of 3 differ" in elements.text
    assert "damaged, ort differs" in elements.text
    assert "First stage past its limit: layer 1" in elements.text
    rows = [a for tag, a in elements.found if tag == "polyline"]
    assert len(rows) == 3
    assert "the bundle alone (row/column):" in elements.text
    assert "bundle, ort keeps and merges as PyTorch does" in elements.text


def test_only_pictures_that_differ_are_drawn_again(page):
    elements = Elements()
    elements.feed(page)
    images = [a["alt"] for tag, a in elements.found if tag == "img"]
    assert images.count("kept patches in PyTorch") == 2
    assert "kept patches of damaged, ort" in images
    assert "kept patches of bundle, ort" not in images


def test_another_name_is_refused_before_anything_is_compared(tmp_path):
    with pytest.raises(OptionError, match=r"is not an \.html file. Name it page\.html"):
        main(bundles=[Path("no")], images=Path("no"), html=tmp_path / "page.pdf")


def test_nan_is_drawn_as_text(verified_bundle, language_checkpoint, photographs, tmp_path):
    def with_nan(values: np.ndarray) -> np.ndarray:
        values[0] = np.nan
        return values

    damage = change_weight("tower.layers.0.mlp.fc1", with_nan)
    damaged = rewrite_bundle(verified_bundle, tmp_path / "damaged", damage)
    goal = tmp_path / "page.html"
    code = main(
        bundles=[damaged],
        model=str(language_checkpoint),
        images=photographs / "coffee.png",
        vision_only=True,
        html=goal,
    )
    text = goal.read_text("utf-8")
    assert code == 1
    assert "layer 0 is the first stage with NaN" in text
    assert 'NaN"' not in text  # in no attribute, such as a point of the chart
