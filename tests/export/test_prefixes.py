"""One graph for every budget of a reducer that ranks: its first tokens are a smaller budget's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundle import open_bundle
from engines.errors import BundleError, OptionError
from engines.manifest import json_from_manifest, manifest_from_json
from engines.ort import OrtSession
from export.build import build_bundle
from export.build.plan import BuildOptions, plan_build
from export.language.language_models import DecoderOptions
from export.vision.to_onnx import trace_graph
from export.vision.vision_module import build_vision_module
from graphs.graph_file import write_graph
from runtime.vision import VisionEncoder
from runtime.vision.graph_pool import GraphPool

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


@pytest.mark.parametrize(("reducer", "given"), CASES)
def test_first_tokens_are_those_of_a_graph_with_that_budget(
    language_checkpoint: Path, tmp_path: Path, reducer: str, given: dict[str, Any]
) -> None:
    options = options_of(language_checkpoint, tmp_path / "bundle", reducer, given)
    build_bundle(options)
    bundle = open_bundle(options.out)
    assert {graph.file for graph in bundle.manifest.vision} == {f"vision/{reducer}_8.onnx"}
    assert [graph.reducer.options["budget"] for graph in bundle.manifest.vision] == [8, 5, 3]
    plan = plan_build(options_of(language_checkpoint, tmp_path / "other", reducer, given))
    with GraphPool(bundle) as pool:
        assert pool.budgets == (3, 5, 8)
        for one in plan.reducers:
            count = one.token_count(plan.patches)
            module = trace_graph(build_vision_module(plan.checkpoint, one))
            with OrtSession(write_graph(module, tmp_path / "alone.onnx").file) as session:
                wanted = _outputs(session, bundle)
            got = pool.encoder(count).encode(PICTURES)
            np.testing.assert_array_equal(got.valid, wanted["valid_count"])
            np.testing.assert_array_equal(got.origin, wanted["patch_index"])
            np.testing.assert_array_equal(got.assignment, wanted["assignment"])
            np.testing.assert_array_equal(got.order, wanted["token_order"])
            for at, valid in enumerate(got.valid):
                difference = got.tokens[at, :valid] - wanted["visual_tokens"][at, :valid]
                assert np.abs(difference).max() <= 1e-6
        assert len({id(pool.encoder(count).session) for count in pool.budgets}) == 1


def _outputs(session: OrtSession, bundle: Any) -> dict[str, Any]:
    from runtime.vision.preprocess import preprocess_batch

    return session.run({"pixel_values": preprocess_batch(PICTURES, bundle.preprocessing)})


def test_a_reducer_that_merges_has_a_graph_for_each_budget(
    language_checkpoint: Path, tmp_path: Path
) -> None:
    given = {"merge": "nearest"}
    options = options_of(language_checkpoint, tmp_path / "bundle", "scope", given)
    build_bundle(options)
    bundle = open_bundle(options.out)
    assert len({graph.file for graph in bundle.manifest.vision}) == 3
    with VisionEncoder(bundle, tokens=8) as encoder:
        seen = encoder.encode(PICTURES)
    with pytest.raises(OptionError, match="merged or does not rank"):
        seen.first(5)


def test_a_manifest_that_cuts_tokens_without_an_order_is_refused(
    language_checkpoint: Path, tmp_path: Path
) -> None:
    options = options_of(language_checkpoint, tmp_path / "bundle", "top_attention", {})
    build_bundle(options)
    manifest = open_bundle(options.out).manifest
    graph = manifest.vision[1]
    unordered = graph.model_copy(
        update={"outputs": tuple(one for one in graph.outputs if one.name != "token_order")}
    )
    edited = manifest.model_copy(update={"vision": (manifest.vision[0], unordered)})
    with pytest.raises(BundleError, match=r"vision\[1\].reducer.tokens is 5 and its file leaves 8"):
        manifest_from_json(json_from_manifest(edited), "bundle.json")
