"""Towers to reduce, the golden files as towers, and reducers as ONNX Runtime sessions."""

from __future__ import annotations

import io
import os
import warnings
from functools import cache
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import onnxruntime
import torch

from export.reducers import Reduced, make_reducer
from export.towers import Scoring, TowerOutput, without_scores

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))

EVERY_REDUCER = [
    make_reducer("visionzip", dominant=14, contextual=2),
    make_reducer("visionzip", dominant=1, contextual=15),
    make_reducer("visionzip", dominant=16, contextual=0),
    make_reducer("prumerge", budget=16),
    make_reducer("prumerge", budget=16, ratio=0.2, merge="average"),
    make_reducer("prumerge", budget=16, merge="none"),
    make_reducer("prumerge_plus", budget=16),
    make_reducer("uniform", budget=16),
    make_reducer("uniform", budget=13, layout="sequential"),
    make_reducer("top_attention", budget=16),
    make_reducer("random", budget=16, seed=3),
    make_reducer("pool", budget=16),
    make_reducer("scope", budget=16),
    make_reducer("scope", budget=16, alpha=0.0, picks_per_step=4, merge="nearest"),
    make_reducer("scope", budget=16, coverage=0.6),
    make_reducer("divprune", budget=16),
    make_reducer("divprune", budget=16, coverage=0.6, merge="nearest"),
    make_reducer("none"),
    make_reducer("none", class_token=True),
]
"""Each registered reducer leaving 13 to 16 tokens (all 64 for `none`)."""


def tower_from_golden(name):
    """Return the tower output, the reducer and the tokens of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as golden:
        case = {key: torch.from_numpy(golden[key]) for key in golden}
    if name.startswith("visionzip"):
        scores = case["cls_attention"][:, :, 1:].sum(dim=1)
        dominant, contextual = int(case["dominant"]), int(case["contextual"])
        options = {"dominant": dominant, "contextual": contextual, "merge": "reference"}
        reducer = make_reducer("visionzip", **options)
    elif name.startswith(("scope", "divprune")):
        features = case["features"]
        case["kept_patches"] = _patches_kept(case)
        case["tokens"] = case["features"].gather(
            1, case["kept_patches"][:, :, None].expand(-1, -1, features.shape[2])
        )
        budget = int(case["budget"])
        if name.startswith("divprune"):
            reducer = make_reducer("divprune", budget=budget)
            return without_scores(features), reducer, case
        reducer = make_reducer("scope", budget=budget, alpha=float(case["alpha"]))
        return TowerOutput(features, case["scores"], features[:, :, :1]), reducer, case
    else:
        width = case["keys"].shape[-1]
        logits = torch.einsum("bc,bsc->bs", case["query_cls"], case["keys"]) / width**0.5
        scores = logits.softmax(dim=-1)[:, 1:]
        torch.testing.assert_close(scores, case["cls_attention"], atol=1e-6, rtol=0)
        reducer = make_reducer(name.rsplit("_", 1)[0], budget=256 if "plus" in name else 128)
    return with_class_token(case["features"], scores, case["keys"]), reducer, case


def with_class_token(features, scores, keys):
    """Return a tower's output whose first feature row is the class token's, and so of the keys."""
    return TowerOutput(features[:, 1:], scores, keys[:, 1:], features[:, :1])


def rows_of(tower):
    """Return features and keys as `with_class_token` takes them; zeros where none was."""
    first = tower.features[:, :1] * 0 if tower.class_token is None else tower.class_token
    keys = torch.nn.functional.pad(tower.keys, (0, 0, 1, 0))
    return torch.cat([first, tower.features], dim=1), keys


def _patches_kept(case):
    """Return the patches a coverage method kept, in spatial order, int64[B, budget]."""
    if "picked_in_order" in case:
        return case["picked_in_order"].sort(dim=1).values
    return torch.stack([row.nonzero()[:, 0] for row in case["kept"]])


def random_tower(batch, patches, width=8, seed=0, scoring=Scoring.SELECTED_LAYER):
    draw = torch.Generator().manual_seed(seed)
    kept = 0 if scoring is Scoring.NONE else 1
    scores = torch.randn(batch, patches, generator=draw).mul(2).softmax(dim=-1)
    return with_class_token(
        torch.randn(batch, 1 + patches, width, generator=draw),
        scores[:, : patches * kept],
        torch.randn(batch, 1 + patches, 6, generator=draw)[:, :, : 6 * kept],
    )


def stack(tower, batch):
    """Return a batch of the requested size out of the pictures a tower has."""
    rows = [row % tower.features.shape[0] for row in range(batch)]
    kept = (tower.features, tower.scores, tower.keys, tower.class_token)
    return TowerOutput(*(None if part is None else part[rows] for part in kept)), rows


class _Graph(torch.nn.Module):
    def __init__(self, reducer):
        super().__init__()
        self.reducer = reducer

    def forward(self, features, scores, keys):
        reduced = self.reducer(with_class_token(features, scores, keys))
        every = (getattr(reduced, name) for name in Reduced.__dataclass_fields__)
        return tuple(tensor for tensor in every if tensor is not None)


@cache
def onnx_of(reducer, patches, width, key_width, opset=18):
    """Export a reducer alone, traced on a batch of 2 with the batch dynamic."""
    scored = reducer.scoring is not Scoring.NONE
    example = (
        torch.randn(2, 1 + patches, width),
        torch.rand(2, patches if scored else 0),
        torch.randn(2, 1 + patches, key_width if scored else 0),
    )
    names = ["tokens", "valid", "origin", "assignment"]
    names += ["order"] * reducer.ranks + ["worth"] * reducer.weighs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about itself
        program = torch.onnx.export(
            _Graph(reducer).eval(),
            example,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=({0: "batch"},) * 3,
            output_names=names,
            verbose=False,
        )
    return program.model_proto


@cache
def _session_of(reducer, patches, width, key_width):
    model = onnx_of(reducer, patches, width, key_width)
    onnx.checker.check_model(model, full_check=True)
    buffer = io.BytesIO()
    onnx.save(model, buffer)
    return onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])


def run_onnx(reducer, tower):
    """Run an exported reducer in ONNX Runtime."""
    session = _session_of(
        reducer, tower.features.shape[1], tower.features.shape[2], tower.keys.shape[2]
    )
    features, keys = rows_of(tower)
    given = {"features": features, "scores": tower.scores, "keys": keys}
    feeds = {node.name: given[node.name].numpy() for node in session.get_inputs()}
    names = [node.name for node in session.get_outputs()]
    return Reduced(**dict(zip(names, map(torch.from_numpy, session.run(None, feeds)), strict=True)))
