"""What holds for every reducer: static shapes, pure rows, consistent origins, allowed operators."""

from dataclasses import replace

import pytest
import torch

from export.reducers import REDUCERS, make_reducer, reducer_for_budget
from export.towers import Scoring, TowerOutput, without_scores
from graphs.operator_check import TENSORRT_OPS
from tests.export.reducer_cases import EVERY_REDUCER, onnx_of, random_tower, run_onnx

PATCHES = 64
every_reducer = pytest.mark.parametrize("reducer", EVERY_REDUCER, ids=str)


def test_every_registered_reducer_is_tested_here():
    assert {reducer.name for reducer in EVERY_REDUCER} == set(REDUCERS)


@every_reducer
@pytest.mark.parametrize("batch", [1, 3])
def test_shapes_and_types(reducer, batch):
    count = reducer.token_count(PATCHES)
    out = reducer(random_tower(batch, PATCHES, scoring=reducer.scoring))
    assert out.tokens.shape == (batch, count, 8)
    assert out.tokens.dtype == torch.float32
    assert out.valid.shape == (batch,)
    assert out.origin.shape == (batch, count)
    assert out.assignment.shape == (batch, PATCHES)
    assert (out.order is not None) == reducer.ranks
    assert (out.worth is not None) == reducer.weighs
    assert {out.valid.dtype, out.origin.dtype, out.assignment.dtype} == {torch.int64}


@every_reducer
def test_half_precision_features_stay_half(reducer):
    tower = random_tower(2, PATCHES, scoring=reducer.scoring)
    half = replace(tower, features=tower.features.half(), class_token=tower.class_token.half())
    # Rounded already, because some choose by features.
    rounded = {"features": half.features.float(), "class_token": half.class_token.float()}
    full = reducer(replace(tower, **rounded))
    out = reducer(half)
    assert out.tokens.dtype == torch.float16
    assert torch.equal(out.origin, full.origin)
    torch.testing.assert_close(out.tokens.float(), full.tokens, atol=2e-2, rtol=0)


@every_reducer
def test_a_picture_does_not_see_its_batch(reducer):
    tower = random_tower(4, PATCHES, scoring=reducer.scoring)
    order = torch.tensor([2, 0, 3, 1])
    parts = (tower.features, tower.scores, tower.keys, tower.class_token)
    mixed = reducer(TowerOutput(*(part[order] for part in parts)))
    straight = reducer(tower)
    for name, tensor in vars(straight).items():
        if tensor is not None:
            torch.testing.assert_close(getattr(mixed, name), tensor[order])


@every_reducer
def test_origin_valid_and_assignment_agree(reducer):
    tower = random_tower(3, PATCHES, scoring=reducer.scoring, seed=5)
    out = reducer(tower)
    for b in range(3):
        origin, valid = out.origin[b].tolist(), int(out.valid[b])
        patches = [patch for patch in origin if patch >= 0]
        assert 1 <= valid <= len(origin)
        assert len(set(patches)) == len(patches)
        assert all(patch < PATCHES for patch in patches)
        assert all(patch == -1 for patch in origin[valid:])
        assert not out.tokens[b, valid:].any()
        for slot, patch in enumerate(origin):
            if patch >= 0:
                assert out.assignment[b, patch] == slot
        for fate in out.assignment[b].tolist():
            assert -1 <= fate < valid or 0 <= -(fate + 2) < valid
        if reducer.name in {"visionzip", "none", "uniform", "random", "top_attention"}:
            for slot, patch in enumerate(origin):
                if patch >= 0:
                    assert torch.equal(out.tokens[b, slot], tower.features[b, patch])


@pytest.mark.parametrize("reducer", [one for one in EVERY_REDUCER if one.weighs], ids=str)
@pytest.mark.parametrize("options", [{}, {"picks_per_step": 4}, {"coverage": 0.6}], ids=str)
def test_worth_falls_along_the_ranking(reducer, options):
    reducer = replace(reducer, **{key: to for key, to in options.items() if hasattr(reducer, key)})
    out = reducer(random_tower(3, PATCHES, scoring=reducer.scoring, seed=5))
    # What merges has the ranking of the same reducer that does not.
    alone = replace(reducer, merge="none") if hasattr(reducer, "merge") else reducer
    order = alone(random_tower(3, PATCHES, scoring=reducer.scoring, seed=5)).order
    for worth, places, valid in zip(out.worth, order, out.valid.tolist(), strict=True):
        ranked = worth[:valid][places[:valid].argsort()]
        assert (ranked[1:] <= ranked[:-1]).all()
        assert (ranked[-1] > 0) and not worth[valid:].any()


@pytest.mark.parametrize("name", ["scope", "divprune"])
def test_where_nothing_is_new_the_first_token_is_worth_most(name):
    """A square of floor is worth one token, a square of many things several."""
    draw = torch.Generator().manual_seed(0)
    floor = torch.ones(1, PATCHES, 8) + 1e-3 * torch.rand(1, PATCHES, 8, generator=draw)
    things = torch.randn(1, PATCHES, 8, generator=draw)
    tower = without_scores(torch.cat([floor, things]))
    options = {"alpha": 0.0} if name == "scope" else {}
    worth = make_reducer(name, budget=8, **options)(tower).worth.sort(descending=True).values
    assert worth[0, 0] >= worth[1, 0] > 0
    assert worth[1, 1:].min() > 100 * worth[0, 1:].max()


@every_reducer
def test_onnx_equals_pytorch_at_another_batch(reducer):
    for batch in (1, 3):
        tower = random_tower(batch, PATCHES, scoring=reducer.scoring, seed=9)
        ours, theirs = reducer(tower), run_onnx(reducer, tower)
        for name, tensor in vars(ours).items():
            if tensor is not None:
                torch.testing.assert_close(getattr(theirs, name), tensor, check_stride=False)


@every_reducer
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["features", "scores", "keys"])
def test_a_patch_that_is_not_finite_spoils_no_other_token(reducer, part, bad):
    tower = random_tower(2, PATCHES, scoring=reducer.scoring, seed=3)
    spoilt = getattr(tower, part)
    reads_keys = reducer.name in {"visionzip", "prumerge", "prumerge_plus"}
    if not spoilt.numel() or (part == "keys" and not reads_keys):
        pytest.skip("this reducer does not read it")
    spoilt[0, 20] = bad  # patch 20 of the first picture
    ours, theirs = reducer(tower), run_onnx(reducer, tower)
    for name, tensor in vars(ours).items():
        if tensor is not None:
            torch.testing.assert_close(
                getattr(theirs, name), tensor, check_stride=False, equal_nan=True
            )
    assert ours.tokens[1].isfinite().all()
    of_patch = {int(ours.assignment[0, 20])} - {-1}
    rotten = set((~ours.tokens[0].isfinite().all(dim=-1)).nonzero()[:, 0].tolist())
    assert rotten <= of_patch
    if reducer.name not in {"none", "uniform", "random"}:
        assert of_patch == set()


@every_reducer
def test_only_operators_tensorrt_parses(reducer):
    model = onnx_of(reducer, PATCHES, 8, 0 if reducer.scoring is Scoring.NONE else 6)
    assert {node.op_type for node in model.graph.node} - TENSORRT_OPS == set()
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "TopK":
            assert node.input[1] in constants, f"{node.name}: K is computed"
        dtypes = {a.i for a in node.attribute if a.name == "to"}
        assert not dtypes & {10, 16}, f"{node.name}: half precision inside a reducer"


@pytest.mark.parametrize("opset", [17, 19])
def test_exports_at_every_opset(opset):
    model = onnx_of(make_reducer("visionzip", dominant=5, contextual=2), 16, 4, 4, opset)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [opset]


def test_random_is_its_seed():
    first, again, other = (make_reducer("random", budget=16, seed=s) for s in (0, 0, 1))
    tower = random_tower(1, PATCHES, scoring=Scoring.NONE)
    assert torch.equal(first(tower).origin, again(tower).origin)
    assert not torch.equal(first(tower).origin, other(tower).origin)


def test_none_is_every_patch_without_the_class_token():
    tower = random_tower(2, PATCHES, scoring=Scoring.NONE)
    assert torch.equal(make_reducer("none")(tower).tokens, tower.features)
    whole = torch.cat([tower.class_token, tower.features], dim=1)
    assert torch.equal(make_reducer("none", class_token=True)(tower).tokens, whole)


@pytest.mark.parametrize(("tokens", "split"), [(64, (54, 10)), (128, (108, 20)), (192, (162, 30))])
def test_visionzip_splits_a_budget_as_the_paper_does(tokens, split):
    reducer = reducer_for_budget("visionzip", tokens, 576)
    assert (reducer.dominant, reducer.contextual) == split
    assert reducer_for_budget("visionzip", tokens, 576, dominant=40).contextual == tokens - 40
    assert reducer_for_budget("visionzip", tokens, 576, contextual=4).dominant == tokens - 4


def test_a_reducer_can_be_made_again_from_its_options():
    for reducer in EVERY_REDUCER:
        assert make_reducer(reducer.name, **reducer.options) == reducer


def test_budgets_of_the_others():
    assert reducer_for_budget("prumerge_plus", 128, 576).budget == 128
    assert reducer_for_budget("none", None, 576).token_count(576) == 576
    assert reducer_for_budget("random", 9, 576, seed=4).options == {"budget": 9, "seed": 4}
    assert (
        reducer_for_budget("visionzip", None, 576, dominant=5, contextual=3).token_count(576) == 8
    )
