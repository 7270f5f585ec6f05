"""Statistics that a graph computes of its own activations, against NumPy on the activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import random_graphs
from calibration.scales.layers import find_sites
from calibration.scales.observers import open_tap
from engines.ort import OrtSession
from graphs.graph_file import set_opset
from graphs.weights_apart import weights_apart
from tests.photographs import clip_pixels

SHARE = 6


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_graphs.write_graph(tmp_path_factory.mktemp("none"), "none")[0]


@pytest.mark.parametrize("opset", [17, 18])
def test_a_graph_measures_what_numpy_does(graph: Path, tmp_path: Path, opset: int) -> None:
    pixels = clip_pixels(56)[0][None].astype(np.float32)
    model = ir.load(graph)
    set_opset(model, opset)
    ir.save(model, tmp_path / "graph.onnx")
    with weights_apart(tmp_path / "graph.onnx") as apart, open_tap(apart, 1) as tap:
        found, _ = tap(pixels, 3, SHARE)
    sites = find_sites(model)
    model.graph.outputs[:] = [site.source for site in sites]
    ir.save(model, tmp_path / "outputs.onnx")
    with OrtSession(tmp_path / "outputs.onnx", threads=1) as session:
        values = session.run({"pixel_values": pixels})
    assert set(found) == {site.name for site in sites}
    for site in sites:
        rows = values[str(site.source.name)].reshape(-1, values[str(site.source.name)].shape[-1])
        one = found[site.name]
        close = {"rtol": 1e-4, "atol": 1e-4}
        np.testing.assert_allclose(one.lowest, rows.min(axis=0), **close)
        np.testing.assert_allclose(one.highest, rows.max(axis=0), **close)
        np.testing.assert_allclose(one.total, rows.sum(axis=0), rtol=1e-3, atol=1e-3)
        assert one.rows == len(rows) and one.sample.shape == (SHARE, rows.shape[1])
        np.testing.assert_allclose(one.sample[0], rows[0], **close)
        assert np.abs(one.sample[1]).max() == pytest.approx(np.abs(rows).max(), rel=1e-4)
        assert one.weight.sum() == pytest.approx(len(rows))
        for row in one.sample:
            assert np.abs(rows - row).max(axis=1).min() < 1e-3
