"""Line charts: well-formed, and points where they belong."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from export.line_chart import Axes, Line, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]  # type: ignore[misc]


def test_points_lie_on_their_scales() -> None:
    lines = [
        Line("a < b", [(32, 10.0), (64, 20.0), (128, 30.0)], [(9, 11), (19, 21), (29, 31)]),
        Line("flat", [(32, 20.0), (128, 20.0)]),
    ]
    root = ElementTree.fromstring(line_chart("t & u", Axes("x", "y", logarithmic=True), lines))
    rising, flat = root.findall(f"{SVG}polyline")
    (x0, y0), (x1, y1), (x2, y2) = points(rising)
    assert x1 - x0 == pytest.approx(x2 - x1)  # a doubling is a doubling
    assert y0 - y1 == pytest.approx(y1 - y2)
    assert y0 > y2  # the page's y points downwards
    assert points(flat)[0] == (x0, y1)
    assert rising.attrib["stroke"] != flat.attrib["stroke"]
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert "t & u" in texts
    assert "a < b" in texts


def test_one_point_and_a_flat_line() -> None:
    for y in (0.0, 5.0):
        ElementTree.fromstring(line_chart("t", Axes("x", "y"), [Line("a", [(1, y)])]))
        ElementTree.fromstring(line_chart("t", Axes("x", "y"), [Line("a", [(1, y), (9, y)])]))
