"""The exported graph on real photographs against the papers' own path, at a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from benchmarks.papers_path import TowerRun, prumerge, run_tower, visionzip
from engines import __version__
from engines.errors import CheckpointError, OptionError
from engines.ort import OrtSession
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.reducers import REDUCERS, make_reducer
from export.towers import Scoring
from export.towers.clip import clip_tower
from export.towers.registry import make_tower
from export.vision.to_onnx import export_onnx, trace_graph
from export.vision.vision_module import build_vision_module
from graphs.graph_file import OPSETS, ExportedGraph, write_graph
from graphs.modules import MODULE_KEY
from graphs.operator_check import TENSORRT_OPS
from tests.photographs import clip_pixels

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "visionzip": ("visionzip", {"dominant": 14, "contextual": 5}),
    "visionzip-reference": (
        "visionzip",
        {"dominant": 14, "contextual": 5, "merge": "reference"},
    ),
    "prumerge": ("prumerge", {"budget": 40}),
    "prumerge_plus": ("prumerge_plus", {"budget": 60}),
    "none": ("none", {}),
    "uniform": ("uniform", {"budget": 16}),
    "random": ("random", {"budget": 16}),
    "scope": ("scope", {"budget": 16, "coverage": 0.8}),
    "divprune": ("divprune", {"budget": 16, "merge": "nearest"}),
    "top_attention": ("top_attention", {"budget": 16}),
    "pool": ("pool", {"budget": 16}),
}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def pixels(checkpoint: Checkpoint) -> np.ndarray[Any, Any]:
    return clip_pixels(checkpoint.preprocessing.height)


@pytest.fixture(scope="module")
def papers_run(checkpoint: Checkpoint, pixels: np.ndarray[Any, Any]) -> TowerRun:
    return run_tower(checkpoint.vision_model(), torch.from_numpy(pixels))


@pytest.fixture(scope="module")
def exported(
    checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[int, ExportedGraph]]:
    """Every case traced once and written in every opset; 17 last, for it cannot go back."""
    folder = tmp_path_factory.mktemp("graphs")
    graphs = {}
    for case, (name, options) in CASES.items():
        model = trace_graph(build_vision_module(checkpoint, make_reducer(name, **options)))
        graphs[case] = {
            opset: write_graph(model, folder / f"{case}-{opset}.onnx", opset=opset)
            for opset in (18, 19, 17)
        }
    return graphs


def run(graph: ExportedGraph, pixels: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    with OrtSession(graph.file, threads=1) as session:
        return session.run({"pixel_values": pixels})


def project(checkpoint: Checkpoint, tokens: torch.Tensor) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return checkpoint.projector()(tokens).numpy()


def test_every_reducer_is_tested_here() -> None:
    assert {name for name, _ in CASES.values()} == set(REDUCERS)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("merge", ["mean", "reference"])
def test_visionzip_equals_the_papers_path(exported, checkpoint, papers_run, pixels, merge, opset):
    case = "visionzip" if merge == "mean" else "visionzip-reference"
    tokens, kept = visionzip(papers_run, 14, 5, merge)
    out = run(exported[case][opset], pixels)
    assert [sorted(row[row >= 0].tolist()) for row in out["patch_index"]] == kept
    np.testing.assert_allclose(out["visual_tokens"], project(checkpoint, tokens), atol=1e-4)
    assert out["valid_count"].tolist() == [19] * len(pixels)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("plus", [False, True])
def test_prumerge_equals_the_papers_path(exported, checkpoint, papers_run, pixels, plus, opset):
    tokens, kept = prumerge(papers_run, plus)
    out = run(exported["prumerge_plus" if plus else "prumerge"][opset], pixels)
    assert len({len(k) for k in kept}) > 1, "every picture keeps as many: the case is too plain"
    for number, mine in enumerate(tokens):
        count = int(out["valid_count"][number])
        assert out["patch_index"][number, : count - 1].tolist() == kept[number]
        expected = project(checkpoint, mine)
        np.testing.assert_allclose(out["visual_tokens"][number, :count], expected, atol=1e-4)


def test_without_reduction_equals_llava(exported, checkpoint, pixels):
    with torch.no_grad():
        features = checkpoint.llava().get_image_features(torch.from_numpy(pixels)).pooler_output
    out = run(exported["none"][18], pixels)
    np.testing.assert_allclose(out["visual_tokens"], torch.stack(features).numpy(), atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_one_picture_and_a_batch_agree(exported, pixels, case):
    batch, alone = run(exported[case][18], pixels), run(exported[case][18], pixels[2:3])
    for name in ("valid_count", "patch_index", "assignment"):
        np.testing.assert_array_equal(batch[name][2:3], alone[name])
    count = int(alone["valid_count"][0])
    np.testing.assert_allclose(
        batch["visual_tokens"][2, :count], alone["visual_tokens"][0, :count], atol=1e-5
    )


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("case", CASES)
def test_graph_is_made_of_what_tensorrt_takes(exported, case, opset):
    model = onnx.load(exported[case][opset].file)
    assert {node.op_type for node in model.graph.node} <= TENSORRT_OPS
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert {node.domain for node in model.graph.node} == {""}
    for node in model.graph.node:
        if node.op_type == "TopK":  # K is a constant
            assert node.input[1] in {w.name for w in model.graph.initializer}


@pytest.mark.parametrize("case", CASES)
def test_nodes_say_where_they_come_from(exported, case):
    model = onnx.load(exported[case][18].file)
    modules = set()
    for node in model.graph.node:
        properties = {p.key: p.value for p in node.metadata_props}
        assert set(properties) == {MODULE_KEY}
        module = properties[MODULE_KEY]
        assert node.name.startswith(f"{module}/" if module else node.op_type)
        assert not node.doc_string
        assert module or node.op_type == "Shape", node.name
        modules.add(module)
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert {"reducer", "tower.layers.0.attention.q_proj", "projector.linear_2"} <= modules
    assert ("tower.scores" in modules or "tower.scores.k_proj" in modules) == (
        make_reducer(CASES[case][0], **CASES[case][1]).scoring is not Scoring.NONE
    )
    names = {w.name for w in model.graph.initializer}
    assert {"tower.layers.0.attention.q_proj.weight", "projector.linear_2.weight"} <= names


def test_attention_is_five_nodes_and_layer_norm_is_one(exported):
    model = onnx.load(exported["visionzip"][17].file)
    kinds = [
        node.op_type
        for node in model.graph.node
        if node.name.startswith("tower.layers.1.attention/")
    ]
    heads = ["Reshape"] * 4 + ["Transpose"] * 4
    assert sorted(kinds) == sorted([*heads, "Mul", "MatMul", "Softmax", "MatMul"])
    norms = [n for n in model.graph.node if n.op_type == "LayerNormalization"]
    assert len(norms) == 1 + 2 * 3  # before the first layer, and two in each


def test_layers_nobody_reads_are_left_out(exported):
    names = [node.name for node in onnx.load(exported["visionzip"][18].file).graph.node]
    assert any("layers.2" in name for name in names)
    assert not any("layers.3" in name or "post_layernorm" in name for name in names)
    weights = onnx.load(exported["prumerge"][18].file).graph.initializer
    last = {
        w.name for w in weights if w.name.startswith("tower.scores") and w.name.endswith("weight")
    }
    assert {"tower.scores.q_proj.weight", "tower.scores.k_proj.weight"} <= last


def test_weights_are_stored_once_and_no_path_of_the_machine_is(exported):
    content = exported["visionzip"][18].file.read_bytes()
    model = onnx.load_from_string(content)
    stored = [onnx.numpy_helper.to_array(w) for w in model.graph.initializer]
    large = [w.tobytes() for w in stored if w.size > 64]
    assert len(set(large)) == len(large)
    assert str(Path.cwd()).encode() not in content
    assert b"site-packages" not in content


def test_a_reducer_that_ranks_says_so(exported, pixels):
    for case in CASES:
        ranks = make_reducer(CASES[case][0], **CASES[case][1]).ranks
        assert ("token_order" in {o.name for o in exported[case][18].outputs}) == ranks
        assert ranks == (case in {"scope", "top_attention"})
    out = run(exported["scope"][18], pixels)
    for valid, order in zip(out["valid_count"], out["token_order"], strict=True):
        assert sorted(order[:valid]) == list(range(valid))
        assert set(order[valid:]) <= {-1}


def test_model_says_what_it_is(checkpoint: Checkpoint, tmp_path: Path) -> None:
    reducer = make_reducer("uniform", budget=9)
    graph = build_vision_module(checkpoint, reducer)
    exported = export_onnx(graph, tmp_path / "v.onnx", metadata={"foveate.model": "tiny"})
    said = {p.key: p.value for p in onnx.load(exported.file).metadata_props}
    assert said["foveate.model"] == "tiny"
    assert said["foveate.reducer"] == "uniform"
    assert json.loads(said["foveate.reducer_options"]) == {"budget": 9, "layout": "grid"}
    assert (said["foveate.tokens"], said["foveate.version"]) == ("9", __version__)
    assert [(o.name, o.dtype, o.shape) for o in exported.outputs] == [
        ("visual_tokens", "float32", ("batch", 9, 48)),
        ("valid_count", "int64", ("batch",)),
        ("patch_index", "int64", ("batch", 9)),
        ("assignment", "int64", ("batch", 64)),
    ]
    assert exported.inputs[0].shape == ("batch", 3, 56, 56)
    assert exported.weights_file is None


def test_external_weights_lie_beside_the_graph(checkpoint, pixels, exported, tmp_path):
    graph = build_vision_module(checkpoint, make_reducer("uniform", budget=16))
    apart = export_onnx(graph, tmp_path / "v.onnx", external_weights=True)
    assert apart.weights_file == tmp_path / "v.onnx.data"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.onnx", "v.onnx.data"]
    assert apart.file.stat().st_size < apart.weights_file.stat().st_size
    np.testing.assert_array_equal(
        run(apart, pixels)["visual_tokens"], run(exported["uniform"][18], pixels)["visual_tokens"]
    )


def test_an_unknown_opset_writes_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    graph = build_vision_module(checkpoint, make_reducer("none"))
    with pytest.raises(OptionError, match="opset 20 is not one of 17, 18, 19"):
        export_onnx(graph, tmp_path / "v.onnx", opset=20)
    assert not list(tmp_path.iterdir())


def test_a_budget_larger_than_the_patches_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(OptionError, match="65 tokens is more than the 64 patches"):
        build_vision_module(checkpoint, make_reducer("uniform", budget=65))


def test_a_checkpoint_that_keeps_the_class_token(make_checkpoint, pixels):
    root = make_checkpoint()
    config = json.loads((root / "config.json").read_text())
    config["vision_feature_select_strategy"] = "full"
    (root / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(root)
    with pytest.raises(OptionError, match=r"class_token is False, but .* is 'full'"):
        build_vision_module(checkpoint, make_reducer("none"))
    graph = build_vision_module(checkpoint, make_reducer("none", class_token=True))
    images = torch.from_numpy(pixels[:2])
    with torch.no_grad():
        expected = checkpoint.llava().get_image_features(images).pooler_output
        tokens, count, index, _ = graph(images)
    torch.testing.assert_close(tokens, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert count.tolist() == [65, 65]
    assert index[0].tolist() == list(range(-1, 64))


def whole(tower):
    return torch.cat([tower.class_token, tower.features], dim=1)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_any_layer_can_be_selected(checkpoint, pixels, layer):
    model = checkpoint.vision_model()
    images = torch.from_numpy(pixels[:2])
    papers = run_tower(model, images, layer)
    with torch.no_grad():
        selected = clip_tower(model, (layer,), Scoring.SELECTED_LAYER)(images)
        last = clip_tower(model, (layer,), Scoring.LAST_LAYER)(images)
    torch.testing.assert_close(whole(selected), papers.features)
    torch.testing.assert_close(selected.scores, papers.attention[:, :, 0, 1:].sum(dim=1))
    torch.testing.assert_close(whole(last), papers.features)
    torch.testing.assert_close(last.keys, papers.last_keys[:, 1:])
    assert selected.keys.shape == (2, 64, 16)


def test_tower_errors_name_what_is_expected(checkpoint: Checkpoint) -> None:
    model = checkpoint.vision_model()
    with pytest.raises(OptionError, match=r"feature layers \[5\] of a tower with 4 layers"):
        clip_tower(model, (5,), Scoring.NONE)
    model.config.model_type = "vit"
    with pytest.raises(CheckpointError, match="'vit' is not one of clip_vision"):
        make_tower(model, (3,), Scoring.NONE)
