"""The exported graph at LLaVA-1.5's real size, on real photographs, against the papers' path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.clip_large import clip_large_graph, random_clip_large, random_projector
from benchmarks.papers_path import TowerRun, prumerge, run_tower, visionzip
from engines.ort import OrtSession
from export.reducers import make_reducer
from export.to_onnx import export_onnx
from tests.photographs import clip_pixels

pytestmark = pytest.mark.slow
PICTURES = 12


@pytest.fixture(scope="module")
def model():
    return random_clip_large()


@pytest.fixture(scope="module")
def projector():
    return random_projector()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray[Any, Any]:
    pictures = clip_pixels(336)
    assert len(pictures) == PICTURES
    return pictures


@pytest.fixture(scope="module")
def papers_runs(model, pixels) -> list[TowerRun]:
    return [run_tower(model, torch.from_numpy(pixels[i : i + 1])) for i in range(PICTURES)]


def run_graph(model, projector, reducer, file: Path, pixels):
    exported = export_onnx(clip_large_graph(model, projector, reducer), file)
    with OrtSession(exported.file, threads=2) as session:
        outputs = [session.run({"pixel_values": pixels[i : i + 1]}) for i in range(PICTURES)]
    exported.file.unlink()
    return outputs


def test_visionzip(model, projector, pixels, papers_runs, tmp_path):
    reducer = make_reducer("visionzip", dominant=54, contextual=10)
    outputs = run_graph(model, projector, reducer, tmp_path / "v.onnx", pixels)
    for run, out in zip(papers_runs, outputs, strict=True):
        tokens, kept = visionzip(run, 54, 10)
        assert sorted(out["patch_index"][out["patch_index"] >= 0].tolist()) == kept[0]
        expected = projector(tokens).numpy()
        np.testing.assert_allclose(out["visual_tokens"], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("plus", [False, True])
def test_prumerge(model, projector, pixels, papers_runs, tmp_path, plus):
    reducer = make_reducer("prumerge_plus" if plus else "prumerge", budget=300)
    outputs = run_graph(model, projector, reducer, tmp_path / "v.onnx", pixels)
    for run, out in zip(papers_runs, outputs, strict=True):
        tokens, kept = prumerge(run, plus)
        count = int(out["valid_count"][0])
        assert out["patch_index"][0, : count - 1].tolist() == kept[0]
        expected = projector(tokens[0]).numpy()
        np.testing.assert_allclose(out["visual_tokens"][0, :count], expected, atol=1e-4, rtol=0)
