"""One graph for every budget of a reducer that ranks: its first tokens are a smaller budget's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from calibration.agreement.graphs import compare_budgets
from calibration.agreement.token_metrics import Agreement, average_agreement
from engines.bundle import Bundle, open_bundle
from engines.errors import BundleError, OptionError
from engines.manifest import json_from_manifest, manifest_from_json
from engines.ort import OrtSession
from export.build import build_bundle
from export.build.plan import BuildOptions
from export.checkpoint.llava import open_checkpoint
from export.language.language_models import DecoderOptions
from export.reducers import Reduced, make_reducer
from export.vision.to_onnx import trace_graph
from export.vision.vision_module import build_vision_module
from graphs.graph_file import write_graph
from runtime.vision import VisionEncoder, VisualTokens
from runtime.vision.graph_pool import GraphPool
from runtime.vision.preprocess import preprocess_batch
from tests.export.reducer_cases import random_tower

PICTURES = np.random.default_rng(7).integers(0, 256, (3, 40, 30, 3), dtype=np.uint8)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("scope", {}),
    ("scope", {"coverage": 0.9}),
    ("scope", {"picks_per_step": 4}),
    ("divprune", {}),
    ("divprune", {"coverage": 0.8}),
    ("top_attention", {}),
]


def options_of(checkpoint: Path, out: Path, reducer: str, given: dict[str, Any]) -> BuildOptions:
    return BuildOptions(
        str(checkpoint),
        out,
        reducer=reducer,
        tokens=(8, 5, 3),
        reducer_options=given,
        decoders=DecoderOptions(precision="fp32"),
    )


@pytest.mark.parametrize(("name", "given"), CASES)
@pytest.mark.parametrize("count", [1, 5, 15])
def test_first_tokens_are_those_of_a_smaller_budget(
    name: str, given: dict[str, Any], count: int
) -> None:
    tower = random_tower(3, 64)
    large, small = (make_reducer(name, budget=budget, **given) for budget in (16, count))
    assert large.serves(small) and not small.serves(large)
    assert not large.serves(make_reducer("pool", budget=4))
    got, wanted = as_tokens(large(tower)).first(count), as_tokens(small(tower))
    for field in ("tokens", "valid", "origin", "assignment", "order"):
        np.testing.assert_array_equal(getattr(got, field), getattr(wanted, field), err_msg=field)


def as_tokens(reduced: Reduced) -> VisualTokens:
    assert reduced.order is not None
    return VisualTokens(
        tokens=reduced.tokens.numpy(),
        valid=reduced.valid.numpy(),
        origin=reduced.origin.numpy(),
        assignment=reduced.assignment.numpy(),
        milliseconds={},
        order=reduced.order.numpy(),
    )


@pytest.mark.parametrize(
    ("name", "given"),
    [("scope", {"merge": "nearest"}), ("divprune", {"merge": "nearest"}), ("pool", {})],
)
def test_a_reducer_whose_merging_depends_on_its_budget_serves_no_other(
    name: str, given: dict[str, Any]
) -> None:
    large, small = (make_reducer(name, budget=budget, **given) for budget in (16, 4))
    assert not large.serves(small)


@pytest.fixture(scope="module")
def ranked(language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Three budgets of a reducer that ranks."""
    out = tmp_path_factory.mktemp("ranked") / "bundle"
    build_bundle(options_of(language_checkpoint, out, "scope", {"coverage": 0.9}))
    return open_bundle(out)


def test_budgets_of_a_ranking_are_one_graph(
    ranked: Bundle, language_checkpoint: Path, tmp_path: Path
) -> None:
    assert {graph.file for graph in ranked.manifest.vision} == {"vision/scope_8.onnx"}
    assert [graph.reducer.options["budget"] for graph in ranked.manifest.vision] == [8, 5, 3]
    checkpoint = open_checkpoint(str(language_checkpoint))
    small = make_reducer("scope", budget=5, coverage=0.9)
    module = trace_graph(build_vision_module(checkpoint, small))
    with OrtSession(write_graph(module, tmp_path / "alone.onnx").file) as session:
        pixels = preprocess_batch(PICTURES, ranked.preprocessing)
        wanted = session.run({"pixel_values": pixels})
    with GraphPool(ranked) as pool:
        assert pool.budgets == (3, 5, 8)
        got = pool.encoder(5).encode(PICTURES)
        assert len({id(pool.encoder(count).session) for count in pool.budgets}) == 1
    np.testing.assert_array_equal(got.valid, wanted["valid_count"])
    np.testing.assert_array_equal(got.origin, wanted["patch_index"])
    np.testing.assert_array_equal(got.assignment, wanted["assignment"])
    np.testing.assert_array_equal(got.order, wanted["token_order"])
    for at, valid in enumerate(got.valid):
        difference = got.tokens[at, :valid] - wanted["visual_tokens"][at, :valid]
        assert np.abs(difference).max() <= 1e-6


def test_tokens_that_were_merged_are_not_cut(ranked: Bundle) -> None:
    with VisionEncoder(ranked, tokens=8) as encoder:
        merged = replace(encoder.encode(PICTURES), order=None)
    with pytest.raises(OptionError, match="merged or does not rank"):
        merged.first(5)
    with pytest.raises(OptionError, match="leaves no more"):
        encoder_tokens = replace(merged, order=merged.origin)
        encoder_tokens.first(9)


def test_a_manifest_that_cuts_tokens_without_an_order_is_refused(ranked: Bundle) -> None:
    manifest = ranked.manifest
    graph = manifest.vision[1]
    unordered = graph.model_copy(
        update={"outputs": tuple(one for one in graph.outputs if one.name != "token_order")}
    )
    edited = manifest.model_copy(update={"vision": (manifest.vision[0], unordered)})
    with pytest.raises(BundleError, match=r"vision\[1\].reducer.tokens is 5 and its file leaves 8"):
        manifest_from_json(json_from_manifest(edited), "bundle.json")


def averages(*given: Any) -> dict[int, Agreement]:
    return {count: average_agreement(found) for count, found in compare_budgets(*given).items()}


def test_every_budget_of_a_ranking_is_compared(ranked: Bundle, tmp_path: Path) -> None:
    """Two graphs that keep the same eight patches, one of them in the opposite order of rank."""
    exact = ranked.path("vision/scope_8.onnx")
    model = ir.load(exact)
    order = next(value for value in model.graph.outputs if value.name == "token_order")
    seven = ir.tensor(np.array(7, np.int64), name="seven")
    constant = ir.val("seven", ir.DataType.INT64, (), const_value=seven)
    model.graph.register_initializer(constant)
    order.name = "rank"
    node = ir.node("Sub", [constant, order])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = (
        "token_order", order.type, order.shape
    )  # fmt: skip
    model.graph.append(node)
    model.graph.outputs[model.graph.outputs.index(order)] = node.outputs[0]
    ir.save(model, tmp_path / "reversed.onnx")
    frames = [preprocess_batch(PICTURES[:1], ranked.preprocessing)]
    same = averages([exact], [exact], frames, (8, 3), 1)
    assert (same[8].overlap, same[3].overlap) == (1.0, 1.0)
    other = averages([exact], [tmp_path / "reversed.onnx"], frames, (8, 3), 1)
    assert other[8].overlap == 1.0
    assert other[3].overlap < 1.0
