"""Weights in a file of their own, shared by variants of a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks import random_graphs
from engines.ort import OrtSession
from graphs.weights_apart import weights_apart
from tests.photographs import clip_pixels


def test_a_variant_costs_only_what_it_changes(tmp_path: Path) -> None:
    source = random_graphs.write_graph(tmp_path, "none")[0]
    inputs = {"pixel_values": clip_pixels(56)[0][None].astype(np.float32)}
    with OrtSession(source, threads=1) as session:
        expected = session.run(inputs)
    with weights_apart(source) as apart:
        folder = apart.parent
        ir.save(ir.load(apart), variant := apart.with_name("variant.onnx"))
        assert variant.stat().st_size < 0.5 * source.stat().st_size
        with OrtSession(variant, threads=1) as session:
            for name, value in session.run(inputs).items():
                np.testing.assert_array_equal(value, expected[name])
    assert not folder.exists()
