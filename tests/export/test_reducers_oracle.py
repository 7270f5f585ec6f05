"""Every reducer against the equations in plain loops, on inputs made to be awkward."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.reducers import make_reducer
from export.towers import Scoring
from tests.export import oracles
from tests.export.reducer_cases import (
    EVERY_REDUCER,
    random_tower,
    rows_of,
    run_onnx,
    with_class_token,
)

SETTINGS = settings(max_examples=60, deadline=None)


@st.composite
def towers(draw, patches=(2, 70), width=4, key_width=5):
    """Draw a tower whose scores tie often and sometimes all do, and whose keys tie too.

    Scores are multiples of 1/64 and tied keys lie on an axis, so that float32 and float64 agree on
    what is equal and a tie is a tie for both.
    """
    b, p = draw(st.integers(1, 3)), draw(st.integers(*patches))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = {
        "distinct": lambda: rng.permuted(np.tile(np.arange(p), (b, 1)), axis=1) / 64,
        "tied": lambda: rng.integers(0, 4, (b, p)) / 64,
        "outliers": lambda: (
            rng.choice([1, 2, 3, 40, 60], (b, p), p=[0.4, 0.3, 0.2, 0.05, 0.05]) / 64
        ),
        "equal": lambda: np.full((b, p), 1 / 64),
    }[draw(st.sampled_from(["distinct", "tied", "outliers", "equal"]))]()
    keys = rng.standard_normal((b, 1 + p, key_width))
    if draw(st.booleans()):
        keys = np.eye(key_width)[rng.integers(0, key_width, (b, 1 + p))] * rng.choice(
            [-2.0, 0.0, 1.0], (b, 1 + p, 1)
        )
    features = rng.integers(-8, 9, (b, 1 + p, width))
    return with_class_token(
        *(torch.tensor(t, dtype=torch.float32) for t in (features, scores, keys))
    )


def check(out, tower, oracle):
    """Compare a batch with what the oracle says of each picture."""
    budget, patches = out.tokens.shape[1], tower.features.shape[1]
    features, every_key = rows_of(tower)
    for b in range(tower.features.shape[0]):
        keys = every_key[b].double().numpy()
        answer = oracle(features[b].double().numpy(), tower.scores[b].double().numpy(), keys)
        padding = budget - len(answer.tokens)
        assert out.valid[b] == len(answer.tokens)
        assert out.origin[b].tolist() == answer.origin + [-1] * padding
        assert out.assignment[b].tolist() == [answer.assignment.get(p, -1) for p in range(patches)]
        if out.order is not None:
            assert out.order[b].tolist() == answer.order + [-1] * padding
        if out.worth is not None:
            worth = answer.worth + [0.0] * padding
            np.testing.assert_allclose(out.worth[b].numpy(), worth, atol=1e-4)
        expected = np.concatenate([np.stack(answer.tokens), np.zeros((padding, 4))])
        np.testing.assert_allclose(out.tokens[b].numpy(), expected, atol=1e-4)


@SETTINGS
@given(towers(), st.data())
def test_visionzip(tower, data):
    patches = tower.scores.shape[1]
    dominant = data.draw(st.integers(1, patches), label="dominant")
    contextual = data.draw(st.integers(0, patches - dominant), label="contextual")
    merge = data.draw(st.sampled_from(["mean", "reference"]), label="merge")
    options = {"dominant": dominant, "contextual": contextual, "merge": merge}
    out = make_reducer("visionzip", **options)(tower)
    check(out, tower, lambda *arrays: oracles.visionzip(*arrays, **options))


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@SETTINGS
@given(tower=towers(), data=st.data())
def test_prumerge(name, tower, data):
    merge = data.draw(st.sampled_from(["sum", "average", "none"]), label="merge")
    budget = data.draw(st.integers(2, tower.scores.shape[1] + (merge != "none")), label="budget")
    options = {"ratio": data.draw(st.sampled_from([0.0, 0.125, 0.3, 1.0])), "merge": merge}
    out = make_reducer(name, budget=budget, **options)(tower)
    plus = name != "prumerge"
    check(out, tower, lambda *arrays: oracles.prumerge(*arrays, budget, plus, **options))


def test_prumerge_plus_can_keep_every_patch_and_the_merged_token():
    scores = torch.full((1, 16), 0.01)
    scores[0, [3, 9, 15]] = 0.2  # r = 3/16, so the grid has every patch but the last, which is out
    tower = with_class_token(torch.randn(1, 17, 4), scores, torch.randn(1, 17, 4))
    out = make_reducer("prumerge_plus", budget=17)(tower)
    assert out.valid.tolist() == [17]
    assert sorted(out.origin[0, :16].tolist()) == list(range(16))
    assert not out.tokens[0, 16].any()  # nothing was pruned


def axis_tower(draw, patches):
    """Draw a tower of features on axes, so that cosines are -1, 0 or 1 and what ties, ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(1, 3))
    axes = np.eye(4)[rng.integers(0, 4, (batch, 1 + patches))]
    features = axes * rng.choice([-2.0, 0.0, 1.0, 4.0], (batch, 1 + patches, 1))
    scores = rng.integers(0, 4, (batch, patches)) / 64
    parts = (features, scores, rng.standard_normal((batch, 1 + patches, 3)))
    return with_class_token(*(torch.tensor(part, dtype=torch.float32) for part in parts))


def smooth_tower(draw, patches):
    """Draw a tower of features without exact ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(1, 3))
    features = rng.standard_normal((batch, 1 + patches, 4)) + 0.5
    scores = rng.random((batch, patches)) + 0.05
    parts = (features, scores, rng.standard_normal((batch, 1 + patches, 3)))
    return with_class_token(*(torch.tensor(part, dtype=torch.float32) for part in parts))


@st.composite
def axis_towers(draw):
    """Draw a tower of 64 patches whose gains, sums of cosines, tie exactly or differ clearly."""
    return axis_tower(draw, 64)


@st.composite
def ranked_cases(draw, **more):
    """Draw a tower and options of a reducer that ranks; with ties, or without any."""
    patches, ties = draw(st.integers(1, 24)), draw(st.booleans())
    options = {
        "budget": draw(st.integers(1, patches)),
        "coverage": draw(st.sampled_from([0.33, 0.61, 0.87, 1.0])),
        "merge": draw(st.sampled_from(["none", "nearest"])),
        "merge_from": draw(st.sampled_from([-1.0, 0.4, 0.7])),
    }
    make = axis_tower if ties else smooth_tower
    return make(draw, patches), options | {name: draw(kind) for name, kind in more.items()}, ties


def picture_of(batch, at):
    """Return one picture of a tower's output or of a reducer's."""
    parts = vars(batch).values()
    return type(batch)(*(part if part is None else part[at : at + 1] for part in parts))


def check_ranked(name, case, oracle):
    """Compare with the oracle; near ties without exact ones may fall either way."""
    tower, options, ties = case
    out = make_reducer(name, **options)(tower)
    ranked = make_reducer(name, **options | {"merge": "none"})(tower)
    for b in range(len(tower.features)):
        padding = int((ranked.order[b] < 0).sum())
        picked = ranked.origin[b][ranked.order[b].argsort()][padding:].tolist()
        alone, one = (
            type(batch)(
                *(None if part is None else part[b : b + 1] for part in vars(batch).values())
            )
            for batch in (out, tower)
        )
        follow = {} if ties else {"follow": picked}
        check(alone, one, lambda x, scores, _, kw=options | follow: oracle(x[1:], scores, kw))


@SETTINGS
@given(
    ranked_cases(
        # Powers that leave ties ties.
        alpha=st.sampled_from([0.0, 1.0, 2.0]),
        picks_per_step=st.sampled_from([1, 2, 3, 8]),
    )
)
def test_scope(case):
    check_ranked("scope", case, lambda x, scores, options: oracles.scope(x, scores, **options))


@SETTINGS
@given(ranked_cases())
def test_divprune(case):
    check_ranked("divprune", case, lambda x, _, options: oracles.divprune(x, **options))


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"alpha": 0.0}, {"alpha": 1.0}], ids=str)
def test_a_ranking_serves_every_smaller_budget(options):
    tower = random_tower(3, 40, seed=4)
    for name, given_options in (("scope", options), ("divprune", {})):
        whole = make_reducer(name, budget=16, **given_options)(tower)
        for budget in (1, 5, 11):
            alone = make_reducer(name, budget=budget, **given_options)(tower)
            for b in range(3):
                prefix = whole.origin[b][whole.order[b] < budget]
                assert torch.equal(prefix, alone.origin[b])


@SETTINGS
@given(towers(patches=(1, 70)), st.data())
def test_uniform(tower, data):
    budget = data.draw(st.integers(1, tower.scores.shape[1]), label="budget")
    out = make_reducer("uniform", budget=budget, layout="sequential")(tower)
    check(out, tower, lambda features, *_: oracles.uniform(features, budget))


@SETTINGS
@given(st.sampled_from([1, 2, 3, 4, 7]), st.data())
def test_uniform_grid(side, data):
    tower = data.draw(towers(patches=(side * side, side * side)))
    rows = data.draw(st.integers(1, side), label="rows")
    shape = make_reducer("pool", budget=rows * side).grid(side * side)
    out = make_reducer("uniform", budget=rows * side)(tower)
    check(out, tower, lambda features, *_: oracles.uniform_grid(features, *shape))


@SETTINGS
@given(towers(patches=(1, 70)), st.data())
def test_top_attention(tower, data):
    budget = data.draw(st.integers(1, tower.scores.shape[1]), label="budget")
    out = make_reducer("top_attention", budget=budget)(tower)
    check(out, tower, lambda x, scores, _: oracles.top_attention(x, scores, budget))


@SETTINGS
@given(st.sampled_from([1, 2, 3, 4, 7]), st.data())
def test_pool(side, data):
    tower = data.draw(towers(patches=(side * side, side * side)))
    rows = data.draw(st.integers(1, side), label="rows")
    reducer = make_reducer("pool", budget=rows * side)
    shape = reducer.grid(side * side)
    assert shape[0] * shape[1] == rows * side
    check(reducer(tower), tower, lambda features, *_: oracles.pool(features, *shape))


@pytest.mark.parametrize(
    "reducer", [r for r in EVERY_REDUCER if r.scoring is not Scoring.NONE], ids=str
)
def test_onnx_breaks_ties_as_pytorch_does(reducer):
    @settings(max_examples=25, deadline=None)
    @given(axis_towers() if reducer.name == "scope" else towers((64, 64), width=8, key_width=6))
    def compare(tower):
        ours, theirs = reducer(tower), run_onnx(reducer, tower)
        assert torch.equal(ours.valid, theirs.valid)
        assert torch.equal(ours.origin, theirs.origin)
        assert torch.equal(ours.assignment, theirs.assignment)
        torch.testing.assert_close(ours.tokens, theirs.tokens, atol=1e-5, rtol=0)

    compare()


def test_prumerge_plus_keeps_a_thin_grid_where_nothing_stands_out():
    tower = with_class_token(
        torch.randn(1, 577, 4), torch.full((1, 576), 1 / 577), torch.randn(1, 577, 4)
    )
    assert make_reducer("prumerge", budget=64)(tower).valid.tolist() == [1]
    plus = make_reducer("prumerge_plus", budget=64)(tower)
    assert plus.origin[0, :4].tolist() == [0, 192, 384, -1]
    assert plus.valid.tolist() == [4]


def test_prumerge_counts_each_picture_of_a_batch_for_itself():
    scores = torch.full((2, 100), 0.001)
    scores[0, :3], scores[1, 40:52] = 0.2, 0.05
    tower = with_class_token(torch.randn(2, 101, 4), scores, torch.randn(2, 101, 4))
    out = make_reducer("prumerge", budget=30)(tower)
    assert out.valid.tolist() == [4, 13]
    assert out.origin[1, :12].tolist() == list(range(40, 52))
