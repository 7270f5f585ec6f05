"""Sampling against transformers' own logits processors, and the statistics of what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engines.errors import OptionError
from runtime.language.sampling import Sampler, Sampling, penalize, probabilities

LOGITS = (3 * np.random.default_rng(0).normal(size=100)).astype(np.float32)
SEEN = [3, 17, 50, 51, 52]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 100])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_probabilities_equal_transformers(
    temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    scores = processors(torch.tensor([SEEN]), torch.from_numpy(LOGITS[None].astype(np.float64)))
    sampling = Sampling(temperature, top_k, top_p, penalty)
    ours = probabilities(penalize(LOGITS, SEEN, penalty), sampling)
    np.testing.assert_allclose(ours, scores.softmax(-1)[0].numpy(), atol=1e-9)


def test_greedy_takes_the_largest_logit() -> None:
    assert Sampler(Sampling()).choose(LOGITS) == LOGITS.argmax()


def test_penalty_discourages_what_was_seen() -> None:
    sampler = Sampler(Sampling(repetition_penalty=1e6))
    first, second = sampler.choose(LOGITS), sampler.choose(LOGITS)
    assert (first, second) == tuple(np.argsort(LOGITS)[::-1][:2])
    prompted = Sampler(Sampling(repetition_penalty=1e6), prompt_ids=[first])
    assert prompted.choose(LOGITS) == second


def test_draws_follow_the_probabilities() -> None:
    sampling = Sampling(temperature=1.5, top_k=8, seed=3)
    sampler = Sampler(sampling)
    draws = 20_000
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(draws)], minlength=len(LOGITS))
    expected = probabilities(LOGITS, sampling)
    assert (counts[expected == 0] == 0).all()
    deviation = np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(counts - draws * expected) <= 5 * deviation + 1e-9).all()


def test_a_seed_repeats_itself_and_another_differs() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=2, seed=seed))
        return [sampler.choose(LOGITS) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_minus_infinity_is_never_chosen(temperature: float) -> None:
    masked = np.full(10, -np.inf, np.float32)
    masked[[2, 5]] = 1.0, 0.5
    sampler = Sampler(Sampling(temperature, repetition_penalty=2.0), prompt_ids=[2, 7])
    assert {sampler.choose(masked) for _ in range(50)} <= {2, 5}


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-100])
def test_almost_no_temperature_takes_the_likeliest(temperature: float) -> None:
    likeliest = int(LOGITS.argmax())
    sampling = Sampling(temperature, top_k=3, top_p=0.9)
    assert Sampler(sampling).choose(LOGITS) == likeliest


def test_every_bad_value_is_named_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        Sampling(temperature=-1, top_k=-2, top_p=0, repetition_penalty=0, seed=-5)
    for name in ("temperature is -1", "top_k is -2", "top_p is 0", "penalty is 0", "seed is -5"):
        assert name in str(caught.value)
    with pytest.raises(OptionError, match="temperature is nan"):
        Sampling(temperature=float("nan"))
