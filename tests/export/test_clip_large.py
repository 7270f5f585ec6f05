"""The exported graph at LLaVA-1.5's real size, on real photographs, against the papers' path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.clip_large import clip_large_graph, random_clip_large, random_projector
from benchmarks.papers_path import NEIGHBOURS, TowerRun, prumerge, run_tower, visionzip
from engines.ort import OrtSession
from export.reducers import make_reducer
from export.vision.to_onnx import export_onnx
from graphs.float16 import write_fp16_graph
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


def run_graph(file: Path, pixels) -> list[dict[str, np.ndarray[Any, Any]]]:
    with OrtSession(file, threads=2) as session:
        return [session.run({"pixel_values": pixels[i : i + 1]}) for i in range(PICTURES)]


def export(model, projector, reducer, file: Path) -> Path:
    return export_onnx(clip_large_graph(model, projector, reducer), file).file


@pytest.fixture(scope="module")
def visionzip_file(model, projector, tmp_path_factory) -> Path:
    reducer = make_reducer("visionzip", dominant=54, contextual=10)
    return export(model, projector, reducer, tmp_path_factory.mktemp("large") / "v.onnx")


@pytest.fixture(scope="module")
def visionzip_outputs(visionzip_file, pixels):
    return run_graph(visionzip_file, pixels)


def test_visionzip(projector, papers_runs, visionzip_outputs):
    for run, out in zip(papers_runs, visionzip_outputs, strict=True):
        tokens, kept = visionzip(run, 54, 10)
        assert sorted(out["patch_index"][out["patch_index"] >= 0].tolist()) == kept[0]
        expected = projector(tokens).numpy()
        np.testing.assert_allclose(out["visual_tokens"], expected, atol=1e-4, rtol=0)


def test_half_precision_keeps_the_same_patches(visionzip_file, visionzip_outputs, pixels):
    half = visionzip_file.with_name("v-fp16.onnx")
    write_fp16_graph(visionzip_file, half)
    kept = shared = 0
    cosines = []
    for full, out in zip(visionzip_outputs, run_graph(half, pixels), strict=True):
        mine, other = full["patch_index"][0], out["patch_index"][0]
        kept += int((mine >= 0).sum())
        shared += len(np.intersect1d(mine[mine >= 0], other[other >= 0]))
        a, b = full["visual_tokens"][0], out["visual_tokens"][0]
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines.append(((a * b).sum(axis=1) / norms)[mine == other])
    lowest = float(np.concatenate(cosines).min())
    print(f"kept patches shared {shared} of {kept}, lowest cosine of matched tokens {lowest:.6f}")
    assert shared >= 0.99 * kept
    assert float(np.concatenate(cosines).mean()) >= 0.999


def tied_neighbours(run: TowerRun, kept: list[int]) -> np.ndarray[Any, Any]:
    """Mark the tokens, the merged one included, whose 32nd neighbour is as near as the 33rd.

    Two cosines closer than float32 rounds are put in either order by either implementation.
    """
    keys = run.last_keys[0, 1:]
    keys = keys / keys.norm(dim=-1, keepdim=True)
    similarity = keys[kept] @ keys.T
    similarity[torch.arange(len(kept)), kept] = -torch.inf
    nearest = similarity.topk(NEIGHBOURS + 1, dim=-1).values
    return np.append((nearest[:, -2] - nearest[:, -1] < 1e-6).numpy(), False)


@pytest.mark.parametrize("plus", [False, True])
def test_prumerge(model, projector, pixels, papers_runs, tmp_path, plus):
    reducer = make_reducer("prumerge_plus" if plus else "prumerge", budget=500)
    file = export(model, projector, reducer, tmp_path / "v.onnx")
    outputs = run_graph(file, pixels)
    file.unlink()
    all_tied = []
    for run, out in zip(papers_runs, outputs, strict=True):
        tokens, kept = prumerge(run, plus)
        count = int(out["valid_count"][0])
        assert out["patch_index"][0, : count - 1].tolist() == kept[0]
        expected = projector(tokens[0]).numpy()
        difference = np.abs(out["visual_tokens"][0, :count] - expected).max(axis=1)
        tied = tied_neighbours(run, kept[0])
        all_tied.append(tied)
        assert difference[~tied].max() <= 1e-4
        # One neighbour for another as near: its attention times how they differ.
        assert difference.max() <= 1e-3
    # Of one picture's few tokens a single tie is a large share; of all pictures' it is a small one.
    assert np.concatenate(all_tied).mean() < 0.1
