"""Errors by stage, on values small enough to work out by hand, and taps of a hand-written graph."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from calibration.agreement.stages import (
    KEYS,
    MERGING,
    PROJECTOR,
    SCORES,
    SELECTION,
    layer_stage,
    measure_stages,
    read_stages,
    run_stages,
    tap_graph,
)
from engines.ort import OrtSession
from runtime.vision import VisualTokens

GRAPH = """
    <ir_version: 10, opset_import: ["" : 19]>
    vision (float[batch, 3, 4] pixel_values) => (
        float[batch, 3, 4] visual_tokens, int64[3] patch_index)
    <float[4] ones = {1.0, 1.0, 1.0, 1.0}, float step = {0.5}, int8 zero = {0},
     int64[1] last = {2}, int64[3] places = {-1, 0, 1}>
    {
        embedded = LayerNormalization <axis = -1> (pixel_values, ones)
        attended = Add (embedded, ones)
        hidden = Add (attended, ones)
        rounded = QuantizeLinear (hidden, step, zero)
        unrounded = DequantizeLinear (rounded, step, zero)
        scores = ReduceSum (hidden, last)
        flat = Squeeze (scores, last)
        chosen = TopK (flat, last)
        reduced = Identity (unrounded)
        half = Cast <to = 10> (reduced)
        whole = Cast <to = 1> (half)
        visual_tokens = Add (whole, ones)
        patch_index = Identity (places)
    }
"""
MODULES = {
    "embedded": "tower.embeddings.norm",
    "attended": "tower.layers.0",
    "hidden": "tower.layers.0",
    "rounded": "tower.layers.0",
    "unrounded": "tower.layers.0",
    "scores": "tower.scores",
    "flat": "tower.scores",
    "chosen": "reducer",
    "reduced": "reducer",
    "half": "projector",
    "whole": "projector",
    "visual_tokens": "projector",
    "patch_index": "reducer",
}


def write_graph(file: Path, *, named: bool = True) -> Path:
    text = GRAPH.replace("chosen = TopK (flat, last)", "chosen = Identity (flat)")
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        module = MODULES[node.output[0]] if named else ""
        node.name = f"{module}/{node.output[0]}"
    onnx.save(model, file)
    return file


def test_a_graph_is_tapped_where_stages_end(tmp_path):
    file = write_graph(tmp_path / "vision.onnx")
    taps = tap_graph([file], tmp_path / "stages.onnx")
    assert taps == {
        "tower.embeddings": ["embedded"],
        "tower.layers.0": ["hidden"],  # not what was rounded for the next stage
        "tower.scores": ["flat"],
        "reducer": ["reduced"],  # before the projector's own Cast
    }
    pixels = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    with OrtSession(tmp_path / "stages.onnx", threads=1) as session:
        stages = run_stages(session, pixels, taps)
    with OrtSession(file, threads=1) as session:
        assert session.output_names == ("visual_tokens", "patch_index")
    assert {name: value.shape for name, value in stages.items()} == {
        "embeddings": (3, 4),
        "layer 0": (3, 4),
        SCORES: (3,),
        MERGING: (3, 4),
    }
    assert np.allclose(stages["layer 0"], stages["embeddings"] + 2.0)


def test_a_graph_without_modules_has_no_stages(tmp_path):
    file = write_graph(tmp_path / "vision.onnx", named=False)
    assert tap_graph([file], tmp_path / "stages.onnx") == {}
    assert not (tmp_path / "stages.onnx").exists()


def test_scores_and_keys_are_told_apart_by_their_shape():
    outputs = {"a": np.zeros((1, 3, 4)), "b": np.zeros((1, 3)), "c": np.zeros((1, 3), np.int64)}
    stages = read_stages(outputs, {"tower.scores": ["c", "a", "b"]})
    assert {name: value.shape for name, value in stages.items()} == {KEYS: (3, 4), SCORES: (3,)}


def tokens(
    origin: list[int], rows: np.ndarray, assignment: tuple[int, ...] = (-1, -1, -1, -1)
) -> VisualTokens:
    return VisualTokens(
        tokens=rows.astype(np.float32)[None],
        valid=np.array([len(origin)]),
        origin=np.array([origin]),
        assignment=np.array([assignment]),
        milliseconds={},
    )


def values(**changes: np.ndarray) -> dict[str, np.ndarray]:
    ones = np.ones((3, 2))
    stages = {"embeddings": ones, "layer 0": ones, "layer 1": ones, SCORES: np.ones(2)}
    return stages | {MERGING: ones} | {k.replace("_", " "): v for k, v in changes.items()}


def test_growth_is_over_the_stage_that_it_follows():
    changed = values(layer_0=np.full((3, 2), 1.1), layer_1=np.full((3, 2), 1.4), scores=np.ones(2))
    same = tokens([-1, 0, 2], np.eye(3))
    measured = {one.stage: one for one in measure_stages(values(), changed, same, same)}
    assert list(measured) == [
        "embeddings", "layer 0", "layer 1", SCORES, SELECTION, MERGING, PROJECTOR,
    ]  # fmt: skip
    assert measured[layer_stage(0)].error == pytest.approx(0.1)
    assert measured[layer_stage(1)].growth == pytest.approx(0.3)
    assert measured[SCORES].growth == pytest.approx(-0.4)  # over layer 1
    assert measured[SELECTION].error == measured[PROJECTOR].error == 0.0


def test_merged_tokens_count_only_where_they_are_made_of_the_same():
    rows = np.eye(3)
    other = rows.copy()
    other[0] = 5.0
    theirs = tokens([-1, 0, 2], rows, (1, 0, 2, -2))  # patches 1 and 3 are merged
    alike = measure_stages(values(), {}, theirs, tokens([-1, 0, 2], other, (1, 0, 2, -2)))
    assert alike[-1].error > 1.0
    flipped = measure_stages(values(), {}, theirs, tokens([-1, 0, 3], other, (1, 0, -2, 2)))
    assert [one.stage for one in flipped] == [SELECTION, PROJECTOR]
    assert flipped[0].error == pytest.approx(2 / 3)
    assert flipped[1].error == 0.0


def test_nan_is_carried_and_its_side_is_known():
    broken = np.full((3, 2), np.nan)
    same = tokens([-1, 0, 2], np.eye(3))
    ours = measure_stages(values(), values(layer_0=broken), same, same)
    theirs = measure_stages(values(layer_0=broken), values(), same, same)
    assert [one.is_finite for one in ours[:3]] == [True, False, True]
    assert ours[1].reference_is_finite
    assert not theirs[1].reference_is_finite
    assert math.isnan(ours[1].growth)
    assert not math.isnan(ours[2].growth)
    short = measure_stages(values(), values(layer_0=np.ones((2, 2))), same, same)
    assert math.isinf(short[1].error)
