"""Encode frames with one of a bundle's budgets, which the budget controller chooses.

Budgets that are prefixes of one graph's ranking are encoded at one cost; they differ in what the
language model reads.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import numpy as np

from engines.errors import OptionError
from engines.frame_size import FrameSize
from runtime.camera.budgets.controller import BudgetController, tell_accuracy
from runtime.camera.budgets.goal import FrameCost, Goal
from runtime.camera.budgets.power import PowerMeter
from runtime.camera.parts import Answerer
from runtime.model import Answer
from runtime.vision import Pixels, VisualTokens
from runtime.vision.graph_pool import GraphPool

_ROUNDS = 5
"""Measurements of each budget, of which the fastest counts. By how much the next one differs is the
noise of it."""
_MOST_ROUNDS = 10_000
"""Where power is measured, rounds go on until a reading is there, but no longer."""
_USUAL_FRAME = FrameSize(1080, 1920)
_ANSWER_TOKENS = 4
"""Length of the answers that are written to measure."""

_log = logging.getLogger(__name__)


class BudgetedEncoder(AbstractContextManager["BudgetedEncoder"]):
    """Every vision graph of a bundle behind one door; the controller says which one runs.

    Attributes:
        budgets: numbers of visual tokens, smallest first.
        controller: chooses among them; None until it was calibrated.
    """

    def __init__(self, pool: GraphPool) -> None:
        """Look which budgets there are.

        Args:
            pool: the graphs; it is closed with this.

        Raises:
            OptionError: the bundle has only one.
        """
        self._pool = pool
        self.controller: BudgetController | None = None
        self.budgets = pool.budgets
        if len(self.budgets) < 2:
            raise OptionError(
                f"{pool.bundle.root} holds one budget, {self.budgets[0]} visual "
                "tokens: nothing to choose from for a goal. Build it with several, for example "
                "`python -m export.build --tokens 32,64,128`."
            )

    def calibrate(
        self, answerer: Answerer, question: str, goal: Goal, meter: PowerMeter | None = None
    ) -> BudgetController:
        """Measure every budget on 1080p pictures of noise and begin to control.

        Args:
            answerer: what reads the tokens; short answers are written and thrown away.
            question: what will be asked.
            goal: what to keep.
            meter: measures power, if the goal is one.

        Raises:
            OptionError: no budget can keep the goal.
            EngineError: a graph cannot be loaded.
        """
        baseline = self._measure(answerer, question, meter)
        accuracy = {tokens: self._pool.bundle.vision(tokens).accuracy for tokens in self.budgets}
        self.controller = BudgetController(baseline, goal, accuracy)
        measured = ", ".join(
            f"{tokens}: {goal.tell(self.controller.predicted(tokens))} "
            f"(accuracy {tell_accuracy(accuracy[tokens])})"
            for tokens in baseline
        )
        beaten = sorted({*self.budgets} - {offer.tokens for offer in self.controller.offers()})
        _log.warning(
            "budget: %s; begins with %d%s%s",
            measured,
            self.controller.tokens,
            "" if self.controller.keeps_goal else ", though none keeps the goal",
            f"; not worth choosing: {', '.join(map(str, beaten))}" if beaten else "",
        )
        return self.controller

    def _measure(
        self, answerer: Answerer, question: str, meter: PowerMeter | None
    ) -> dict[int, FrameCost]:
        """Return what each budget costs. They take turns: a load that comes and goes hits all."""
        random = np.random.default_rng(0)

        def answer(visual: VisualTokens) -> FrameCost:
            pieces = itertools.count(1)
            said = answerer.answer(
                visual, question, lambda: None, lambda: next(pieces) >= _ANSWER_TOKENS
            )
            return cost_of(visual, said)

        def encode(tokens: int) -> VisualTokens:
            encoder = self._pool.encoder(tokens)
            size = encoder.frame_size or _USUAL_FRAME
            shape = (size.height, size.width, 3)
            image = random.integers(0, 256, shape, dtype=np.uint8)  # nothing reused
            return encoder.encode([image])

        def play_one(tokens: int) -> FrameCost:
            return answer(encode(tokens))

        def play_round() -> dict[int, FrameCost]:
            costs: dict[int, FrameCost] = {}
            for budgets in self._by_graph:  # one graph's are encoded once: they cost the same
                visual = encode(budgets[-1])
                costs |= {tokens: answer(visual.first(tokens)) for tokens in budgets}
            return costs

        play_round()  # warms up
        rounds = [play_round() for _ in range(_ROUNDS)]
        baseline = {}
        for tokens in self.budgets:
            costs = [costs[tokens] for costs in rounds]
            fastest_ms, next_ms, *_ = sorted(cost.first_token_ms for cost in costs)
            baseline[tokens] = FrameCost(
                fastest_ms,
                min(cost.token_ms for cost in costs),
                None if meter is None else _watts_of(meter, partial(play_one, tokens)),
                noise=next_ms / fastest_ms - 1.0,
            )
        return baseline

    @property
    def _by_graph(self) -> list[list[int]]:
        """The budgets that one pass of a graph gives together, smallest first."""
        if self._pool.bundle.most_squares > 1:  # the rank is that of one tile alone
            return [[tokens] for tokens in self.budgets]
        graphs: dict[str, list[int]] = {}
        for tokens in self.budgets:
            graphs.setdefault(self._pool.bundle.vision(tokens).file, []).append(tokens)
        return list(graphs.values())

    def encode(self, images: Sequence[Pixels]) -> list[VisualTokens]:
        """Encode images as one batch with the budget of the moment; return the tokens of each."""
        tokens = self.controller.tokens if self.controller else self.budgets[0]
        return self._pool.encoder(tokens).encode(list(images)).split()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs; calling it again does nothing."""
        self._pool.close()


class ObservedAnswerer:
    """An answerer that tells the controller what each new frame cost."""

    def __init__(
        self, answerer: Answerer, controller: BudgetController, meter: PowerMeter | None = None
    ) -> None:
        self._answerer = answerer
        self._controller = controller
        self._meter = meter
        self._last: VisualTokens | None = None

    def answer(
        self,
        visual: VisualTokens,
        question: str,
        prefilled: Callable[[], None],
        interrupted: Callable[[], bool],
    ) -> Answer:
        """Answer as the answerer does; tokens that were kept tell nothing and are not counted."""
        answer = self._answerer.answer(visual, question, prefilled, interrupted)
        watts = self._meter.take_watts() if self._meter else None
        if visual is not self._last and (self._meter is None or watts is not None):
            cost = replace(cost_of(visual, answer), watts=watts)
            self._controller.observe(visual.budget, cost, len(answer.token_ids))
        self._last = visual
        return answer


def _watts_of(meter: PowerMeter, play_round: Callable[[], object]) -> float:
    """Return what is drawn while rounds are played; it takes as many as a reading takes."""
    play_round()
    meter.take_watts()  # of what was before
    for _ in range(_MOST_ROUNDS):
        play_round()
        watts = meter.take_watts()
        if watts is not None:
            return watts
    raise OptionError("The power meter has stopped: it gives no readings any more.")


def cost_of(visual: VisualTokens, answer: Answer) -> FrameCost:
    """Return what a frame and its answer cost, power aside."""
    first_token_ms = sum(visual.milliseconds.values()) + answer.milliseconds["prefill"]
    return FrameCost(first_token_ms, answer.milliseconds["decode"] / max(len(answer.token_ids), 1))
