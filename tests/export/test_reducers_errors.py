"""Every way to ask for a reducer that cannot be had, and what is said then."""

import pytest
import torch

from engines.errors import OptionError
from export.reducers import make_reducer, reducer_for_budget
from export.towers import TowerOutput


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "visionzap",
            {},
            "'visionzap' is not one of divprune, none, pool, prumerge, ",
        ),
        ("visionzap", {}, "Did you mean 'visionzip'?"),
        ("visionzip", {"dominant": 5, "contextual": 1, "keep": 2}, "no option 'keep'"),
        (
            "visionzip",
            {"tokens": 64},
            "option 'dominant' is missing; option 'contextual' is missing",
        ),
        ("visionzip", {"tokens": 64}, "It takes dominant, contextual, merge."),
        ("none", {"budget": 3}, "no option 'budget'. It takes class_token."),
        ("none", {"class_token": 1}, "class_token is 1, expected True or False"),
        ("prumerge", {}, "option 'budget' is missing"),
        ("prumerge", {"budget": 1}, "budget is 1, expected a whole number of 2 or more"),
        ("prumerge", {"budget": 9, "ratio": 2}, "ratio is 2, expected a share, 0 to 1"),
        ("prumerge", {"budget": 9, "merge": "mean"}, "merge is 'mean', expected one of sum, avera"),
        ("pool", {"budget": 0}, "budget is 0, expected a whole number of 1 or more"),
        ("uniform", {"budget": 2.5}, "budget is 2.5, expected a whole number"),
        ("uniform", {"budget": True}, "budget is True, expected a whole number"),
        ("uniform", {"budget": 4, "layout": "1d"}, "layout is '1d', expected one of grid, seq"),
        ("scope", {"budget": 4, "alpha": -1}, "alpha is -1, expected a number of 0 or more"),
        ("scope", {"budget": 4, "alpha": "much"}, "alpha is 'much', expected a number of 0 or"),
        ("scope", {"budget": 4, "picks_per_step": 0}, "picks_per_step is 0, expected a whole numb"),
        ("scope", {"budget": 4, "coverage": 1.2}, "coverage is 1.2, expected a number above 0, at"),
        ("divprune", {"budget": 4, "coverage": 0}, "coverage is 0, expected a number above 0"),
        ("scope", {"budget": 4, "merge_from": 2}, "merge_from is 2, expected a cosine, -1 to 1"),
        ("divprune", {"budget": 4, "merge": "mean"}, "merge is 'mean', expected one of none, near"),
        ("random", {"budget": 4, "seed": -1}, "seed is -1, expected a whole number of 0 or more"),
        (
            "visionzip",
            {"dominant": 0, "contextual": -1},
            "dominant is 0, expected a whole number of 1",
        ),
        (
            "visionzip",
            {"dominant": 0, "contextual": -1},
            "contextual is -1, expected a whole number",
        ),
        (
            "visionzip",
            {"dominant": 5, "contextual": 1, "merge": "sum"},
            "merge is 'sum', expected one of mean, reference",
        ),
    ],
)
def test_options_that_cannot_be_served(name, options, says):
    with pytest.raises(OptionError) as error:
        make_reducer(name, **options)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("visionzip", {"dominant": 54, "contextual": 10}),
        ("prumerge", {"budget": 64}),
        ("prumerge_plus", {"budget": 64}),
        ("uniform", {"budget": 64}),
        ("scope", {"budget": 64}),
        ("divprune", {"budget": 64}),
        ("top_attention", {"budget": 64}),
        ("random", {"budget": 64}),
        ("pool", {"budget": 64}),
    ],
)
def test_a_budget_larger_than_the_patches(name, options):
    reducer = make_reducer(name, **options)
    tower = TowerOutput(torch.zeros(1, 49, 4), torch.zeros(1, 49), torch.zeros(1, 49, 4))
    for use in (lambda: reducer.token_count(49), lambda: reducer(tower)):
        with pytest.raises(
            OptionError, match=f"reducer {name}: a budget of 64 .* 49 patches .* 49"
        ):
            use()


@pytest.mark.parametrize(
    ("name", "tokens", "given", "says"),
    [
        ("visionzip", 700, {}, "700 tokens is more than the 576 patches"),
        ("visionzip", 0, {}, "0 tokens asked for, expected 1 or more"),
        ("visionzip", 64, {"dominant": 70}, "contextual is -6"),
        ("visionzip", 64, {"dominant": "many"}, "dominant is 'many', expected a whole number"),
        ("visionzip", 64, {"dominant": 9, "contextual": 9}, "64 tokens asked for, but its options"),
        ("visionzip", None, {}, "option 'dominant' is missing"),
        (
            "none",
            64,
            {},
            "64 tokens asked for, but its options (class_token=False) leave 576 of 576 patches",
        ),
        (
            "prumerge",
            64,
            {"budget": 32},
            "64 tokens asked for, but its options (budget=32, ratio=0.0, merge=sum) leave 32",
        ),
        ("sharpen", 64, {}, "'sharpen' is not one of"),
        ("pool", 127, {}, "127 tokens cannot be laid out as rows x columns within 24 x 24 patches"),
        ("pool", 127, {}, "Ask for 126 or 128."),
    ],
)
def test_a_budget_that_cannot_be_met(name, tokens, given, says):
    with pytest.raises(OptionError) as error:
        reducer_for_budget(name, tokens, 576, **given)
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["pool", "uniform"])
def test_a_grid_wants_a_square(name):
    with pytest.raises(OptionError, match="50 patches, expected a square number of them"):
        make_reducer(name, budget=10).token_count(50)
    with pytest.raises(OptionError, match="13 tokens cannot be laid out as rows x columns"):
        make_reducer(name, budget=13).token_count(49)
