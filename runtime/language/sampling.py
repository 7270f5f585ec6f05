"""Choose the next token from logits: greedy, or drawn after temperature, top-k and top-p.

The order (repetition penalty, temperature, top-k, top-p) and every formula are those of
transformers, so a setting means the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from engines.cli import SeedOption
from engines.errors import OptionError
from runtime.language.parts import Logits

Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; larger is more varied.
        top_k: draw among the k most likely tokens; 0 among all.
        top_p: draw among the fewest tokens whose probabilities reach this sum.
        repetition_penalty: divides the logits of tokens already seen, prompt included; 1 is off.
        seed: the same seed and prompt draw the same answer.
    """

    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely word; more is more varied.")
    ] = 0.0
    top_k: Annotated[int, typer.Option(help="Draw among the k likeliest tokens; 0: all.")] = 0
    top_p: Annotated[
        float, typer.Option(help="Draw among the fewest tokens with this total probability.")
    ] = 1.0
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 discourages tokens already seen.")
    ] = 1.0
    seed: SeedOption = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, expected {expected}"
            for name, value, good, expected in (
                ("temperature", self.temperature, 0 <= self.temperature < np.inf, "0 or more"),
                ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1"),
                (
                    "repetition_penalty",
                    self.repetition_penalty,
                    1e-9 <= self.repetition_penalty <= 1e9,
                    "1e-9 to 1e9 (1 is off)",
                ),
                ("seed", self.seed, self.seed >= 0, "0 or more"),
            )
            if not good
        ]
        if problems:
            raise OptionError(f"Sampling cannot use these values: {'; '.join(problems)}.")


class Sampler:
    """Chooses the tokens of one answer; remembers what it has seen and its random state."""

    def __init__(self, sampling: Sampling, prompt_ids: Iterable[int] = ()) -> None:
        self._sampling = sampling
        self._seen = set(prompt_ids)
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: Logits) -> int:
        """Return the next token id; a logit of minus infinity is never chosen."""
        scores = penalize(logits, self._seen, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            likely = probabilities(scores, self._sampling)
            token = int(self._random.choice(len(likely), p=likely))
        self._seen.add(token)
        return token


def penalize(logits: Logits, seen: Iterable[int], penalty: float) -> NDArray[np.float64]:
    """Make tokens already seen less likely (Keskar et al. 2019, section 4.1)."""
    scores = logits.astype(np.float64)
    if penalty != 1:
        ids = np.fromiter(seen, np.int64)
        scores[ids] = np.where(scores[ids] > 0, scores[ids] / penalty, scores[ids] * penalty)
    return scores


def probabilities(logits: NDArray[Any], sampling: Sampling) -> Probabilities:
    """Return what each token is drawn with, float64[V], after temperature, top-k and top-p."""
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # the likeliest is 0 and stays it, however small the divisor
        scores = (scores - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        smallest_kept = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores[scores < smallest_kept] = -np.inf
    if sampling.top_p < 1:
        rising = np.argsort(scores, kind="stable")
        tail = np.cumsum(_softmax(scores[rising])) <= 1 - sampling.top_p
        tail[-1] = False  # the most likely token always stays
        scores[rising[tail]] = -np.inf
    return _softmax(scores)


def _softmax(scores: NDArray[np.float64]) -> Probabilities:
    weights = np.exp(scores - scores.max())
    normalized: Probabilities = weights / weights.sum()
    return normalized
