"""CLIP-L/14-336, random weights: transformers' own tower against the ONNX graph, real photographs.

The reference asks transformers for every attention matrix, as the papers' code does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from engines.ort import OrtSession
from export.reducers import make_reducer
from export.reference import observe_tower
from export.to_onnx import export_onnx
from export.towers import Scoring
from export.towers.registry import make_tower
from export.visual_graph import VisualGraph
from tests.photographs import clip_pixels

CASES = {
    "visionzip": {"dominant": 54, "contextual": 10},
    "prumerge": {"budget": 64},
    "prumerge_plus": {"budget": 192},
}


@pytest.fixture(scope="module")
def clip_large() -> CLIPVisionModel:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
        initializer_factor=2.0,  # attention as far from even as a trained tower's
    )
    return CLIPVisionModel(config).eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_photographs_at_full_size(clip_large: CLIPVisionModel, name: str, tmp_path: Path) -> None:
    reducer = make_reducer(name, **CASES[name])
    pixels = clip_pixels(336)
    assert len(pixels) >= 10
    tower = make_tower(clip_large, 23, reducer.scoring)
    projector = torch.nn.Sequential(
        torch.nn.Linear(1024, 256), torch.nn.GELU(), torch.nn.Linear(256, 256)
    )
    graph = VisualGraph(tower, reducer, projector, image_size=336, patches=576)
    exported = export_onnx(graph.eval().requires_grad_(False), tmp_path / "vision.onnx")
    clip_large.set_attn_implementation("eager")
    with OrtSession(exported.file) as session:
        for picture in pixels:
            out = session.run({"pixel_values": picture[None]})
            with torch.no_grad():
                seen = observe_tower(clip_large, 23, reducer.scoring, torch.tensor(picture[None]))
                expected = reducer(seen)
                tokens = projector(expected.tokens).numpy()
            valid = int(expected.valid)
            np.testing.assert_array_equal(out["valid_count"], expected.valid.numpy())
            np.testing.assert_array_equal(out["patch_index"], expected.origin.numpy())
            np.testing.assert_array_equal(out["assignment"], expected.assignment.numpy())
            assert np.abs(out["visual_tokens"][:, :valid] - tokens[:, :valid]).max() <= 1e-4
            assert np.ptp(seen.scores.numpy()) > 0


def test_all_scored_reducers_are_run_at_full_size() -> None:
    assert {make_reducer(name, **options).scoring for name, options in CASES.items()} == {
        Scoring.SELECTED_LAYER,
        Scoring.LAST_LAYER,
    }
