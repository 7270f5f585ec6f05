"""How many visual tokens can be afforded: a bundle's graphs chosen so that a goal is kept.

Enters: what each frame cost, and with which budget. Leaves: the budget for the next one. What a
budget costs is measured beforehand, not modelled; what it costs under the load of the moment is
that times how much more the last frames cost than measured. A budget is given up at once when it
costs too much and taken back only after it would have fitted for a while, so the choice does not
flap.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from engines.errors import OptionError
from runtime.camera.parts import Estimate

_CALM = 0.85
"""A larger budget must be predicted to cost less than this share of the goal."""
_PATIENCE = 8
"""Frames in a row for which that must hold."""
_ANSWER_TOKENS = 8.0
"""Length of an answer until one has been seen."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """What a frame costs with one budget.

    Attributes:
        first_token_ms: from pixels to the first token of the answer.
        token_ms: for each token after that.
        watts: drawn meanwhile; None where nobody measures it.
    """

    first_token_ms: float
    token_ms: float = 0.0
    watts: float | None = None


@dataclass(frozen=True)
class Goal:
    """What is to be kept.

    Attributes:
        kind: ``latency``: milliseconds to the first token, at most; ``rate``: tokens of answers per
            second, encoding included, at least; ``power``: watts, at most.
        value: how many.
    """

    kind: Literal["latency", "rate", "power"]
    value: float

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise OptionError(f"The {self.kind} to keep is {self.value:g}, expected more than 0.")

    @property
    def limit(self) -> float:
        """The most a frame may cost, in what `cost_of` returns."""
        return 1e3 / self.value if self.kind == "rate" else self.value

    def cost_of(self, cost: Cost, answer_tokens: float) -> float:
        """Return what counts of a cost: ms, ms for each token of an answer, or watts."""
        if self.kind == "latency":
            return cost.first_token_ms
        if self.kind == "rate":
            return cost.first_token_ms / answer_tokens + cost.token_ms
        return cost.watts or 0.0

    def tell(self, amount: float) -> str:
        """Return an amount of `cost_of` in words."""
        if self.kind == "latency":
            return f"{amount:.0f} ms"
        return f"{1e3 / amount:.1f} tokens/s" if self.kind == "rate" else f"{amount:.1f} W"


@dataclass(frozen=True)
class Decision:
    """A change of budget.

    Attributes:
        tokens: the new budget.
        before: the old one.
        reason: one sentence, with what both cost and how right their answers were measured to be.
    """

    tokens: int
    before: int
    reason: str


class BudgetController:
    """Chooses among budgets; safe to use from several threads.

    Attributes:
        tokens: the budget to use now.
        decisions: every change so far.
    """

    def __init__(
        self,
        baseline: Mapping[int, Cost],
        goal: Goal,
        accuracy: Mapping[int, float | None] | None = None,
    ) -> None:
        """Begin with the largest budget that keeps the goal on an unloaded machine.

        Args:
            baseline: tokens -> what a frame costs, unloaded.
            goal: what to keep.
            accuracy: tokens -> share of right answers, where it was measured.

        Raises:
            OptionError: no budgets, or a goal that none of them can keep. A power goal may be met
                by waiting between answers, so it is never refused; it begins with the smallest.
        """
        if not baseline:
            raise OptionError("A goal needs vision graphs to choose from.")
        self.decisions: list[Decision] = []
        self._baseline = dict(sorted(baseline.items()))
        self._goal = goal
        self._accuracy = dict(accuracy or {})
        self._load = Estimate()
        self._answer_tokens = Estimate()
        self._calm_frames = 0
        self._lock = threading.Lock()
        fitting = [n for n in self._baseline if self.predicted(n) <= goal.limit]
        if not fitting and goal.kind != "power":
            least = min(self._baseline, key=self.predicted)
            raise OptionError(
                f"The goal is {goal.tell(goal.limit)}, and even {least} visual tokens take "
                f"{goal.tell(self.predicted(least))} on this machine. Ask for less, or build the "
                "bundle with fewer tokens or in a lower precision."
            )
        self.tokens = max(fitting, default=min(self._baseline))

    def predicted(self, tokens: int) -> float:
        """Return what a budget is expected to cost under the load of the moment."""
        load = self._load.mean if self._load.known else 1.0
        return load * self._goal.cost_of(self._baseline[tokens], self._length)

    @property
    def _length(self) -> float:
        return self._answer_tokens.mean if self._answer_tokens.known else _ANSWER_TOKENS

    def observe(self, tokens: int, cost: Cost, answer_tokens: int = 1) -> Decision | None:
        """Take one measurement and return the change it led to, if any.

        Args:
            tokens: the budget it was made with.
            cost: what the frame cost.
            answer_tokens: how long its answer was.
        """
        with self._lock:
            self._answer_tokens.add(max(answer_tokens, 1))
            expected = self._goal.cost_of(self._baseline[tokens], self._length)
            self._load.add(self._goal.cost_of(cost, self._length) / max(expected, 1e-9))
            if tokens != self.tokens:  # encoded before the last change
                return None
            return self._step_down() or self._step_up()

    def _step_down(self) -> Decision | None:
        limit = self._goal.limit
        smaller = [n for n in self._baseline if n < self.tokens]
        if self.predicted(self.tokens) <= limit or not smaller:
            return None
        fitting = [n for n in smaller if self.predicted(n) <= limit]
        return self._decide(max(fitting) if fitting else min(smaller), "too much")

    def _step_up(self) -> Decision | None:
        larger = [n for n in self._baseline if n > self.tokens]
        if not larger or self.predicted(min(larger)) > _CALM * self._goal.limit:
            self._calm_frames = 0
            return None
        self._calm_frames += 1
        if self._calm_frames < _PATIENCE:
            return None
        return self._decide(min(larger), "to spare")

    def _decide(self, tokens: int, why: str) -> Decision:
        goal = self._goal
        reason = (
            f"{why}: {goal.tell(self.predicted(self.tokens))} with {self.tokens} visual tokens "
            f"(goal {goal.tell(goal.limit)}, load {self._load.mean:.2f}); now {tokens}, "
            f"accuracy {self._tell_accuracy(self.tokens)} -> {self._tell_accuracy(tokens)}"
        )
        decision = Decision(tokens, self.tokens, reason)
        self.tokens, self._calm_frames = tokens, 0
        self.decisions.append(decision)
        _log.warning("budget: %s", reason)
        return decision

    def _tell_accuracy(self, tokens: int) -> str:
        return tell_accuracy(self._accuracy.get(tokens))


def tell_accuracy(accuracy: float | None) -> str:
    """Return a share of right answers in words."""
    return "unknown" if accuracy is None else f"{accuracy:.1%}"
