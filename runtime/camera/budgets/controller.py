"""Choose among a bundle's graphs so that a goal is kept.

The controller takes the most accurate budget that keeps the goal. The cost of each budget is
measured beforehand and scaled by how much more the last frames cost than measured. A budget that
costs too much is given up at once and taken back only after it would have fitted for a while, so
the choice does not flap. Where no budget keeps the goal, the one with the most right answers for
its cost runs, and the decision says so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from engines.errors import OptionError
from runtime.camera.budgets.goal import FrameCost, Goal
from runtime.camera.budgets.pareto import Offer, most_for_its_cost, worthwhile
from runtime.camera.parts import Estimate

_CALM = 0.85
"""A more accurate budget must be predicted to cost less than this share of the goal; and the goal
is out of reach where it is less than this share of what the cheapest costs."""
_PATIENCE = 8
"""Frames in a row for which a change must look right that is not urgent."""
_LONG = 30
"""Frames in a row before it is said that no budget keeps the goal, or that it is kept again, while
the budget stays: near the limit both are true by turns."""
_CLEARLY_MORE = 1.05
"""So many times the right answers for the cost are worth a change where no budget keeps the
goal."""
_ANSWER_TOKENS = 8.0
"""Length of an answer until one has been seen."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """A change of budget, or word that the goal can be kept no longer, or again.

    Attributes:
        tokens: the new budget.
        before: the old one, which may be the same.
        keeps_goal: whether the new one is expected to keep the goal; if not, none does.
        reason: one sentence, with what both cost and how right their answers were measured to be.
    """

    tokens: int
    before: int
    keeps_goal: bool
    reason: str


class BudgetController:
    """Chooses among budgets; safe to use from several threads.

    Attributes:
        tokens: the budget to use now.
        accuracy: tokens -> share of right answers, None where it is not known.
        decisions: every one so far.
    """

    def __init__(
        self,
        baseline: Mapping[int, FrameCost],
        goal: Goal,
        accuracy: Mapping[int, float | None] | None = None,
    ) -> None:
        """Begin with the most accurate budget that keeps the goal on an unloaded machine.

        Args:
            baseline: tokens -> what a frame costs, unloaded.
            goal: what to keep.
            accuracy: tokens -> share of right answers, where it was measured. Unless it is known
                of every budget, more tokens are taken to be more right.

        Raises:
            OptionError: no budgets, or a goal that none of them can keep. A power goal may be met
                by waiting between answers, so it is never refused.
        """
        if not baseline:
            raise OptionError("A goal needs vision graphs to choose from.")
        self.decisions: list[Decision] = []
        self.accuracy = {tokens: (accuracy or {}).get(tokens) for tokens in sorted(baseline)}
        self._baseline = dict(sorted(baseline.items()))
        self._goal = goal
        self._load = Estimate()
        self._answer_tokens = Estimate()
        self._calm_frames = self._hopeless_frames = self._hopeful_frames = 0
        self._given_up = False
        self._lock = threading.Lock()
        least = min(self._baseline, key=self.predicted)
        if self.predicted(least) > goal.limit and goal.kind != "power":
            raise OptionError(
                f"The goal is {goal.tell(goal.limit)}, and even {least} visual tokens take "
                f"{goal.tell(self.predicted(least))} on this machine. Ask for less, or build the "
                "bundle with fewer tokens or in a lower precision."
            )
        offers = self.offers()
        fitting = [offer for offer in offers if offer.cost <= goal.limit]
        self.tokens = (fitting[0] if fitting else most_for_its_cost(offers)).tokens

    @property
    def keeps_goal(self) -> bool:
        """Whether the budget of the moment is expected to keep the goal."""
        return self.predicted(self.tokens) <= self._goal.limit

    def predicted(self, tokens: int) -> float:
        """Return what a budget is expected to cost under the load of the moment."""
        load = self._load.mean if self._load.known else 1.0
        return load * self._goal.cost_of(self._baseline[tokens], self._length)

    def offers(self) -> list[Offer]:
        """Return the budgets worth choosing, most accurate first, at the cost of the moment.

        The others are less accurate than one of these and not clearly cheaper.
        """
        return worthwhile([self._offer(tokens) for tokens in self._baseline])

    def observe(self, tokens: int, cost: FrameCost, answer_tokens: int = 1) -> Decision | None:
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
            offers = self.offers()
            fitting = [offer for offer in offers if offer.cost <= self._goal.limit]
            if not fitting:
                return self._make_the_best_of(offers)
            self._hopeless_frames = 0
            if self.predicted(self.tokens) > self._goal.limit:
                return self._decide(fitting[0], "too much")
            return self._step_up(offers)

    @property
    def _length(self) -> float:
        return self._answer_tokens.mean if self._answer_tokens.known else _ANSWER_TOKENS

    def _offer(self, tokens: int) -> Offer:
        known = None not in self.accuracy.values()
        return Offer(
            tokens,
            self.predicted(tokens),
            self.accuracy[tokens] if known else None,
            self._goal.noise_of(self._baseline[tokens]),
        )

    def _step_up(self, offers: list[Offer]) -> Decision | None:
        """Take a more accurate budget back, once it has fitted for a while."""
        now = self._offer(self.tokens)
        self._hopeful_frames += 1
        if self._given_up and self._hopeful_frames >= _LONG:
            return self._decide(now, "the goal is kept again")
        calm = [offer for offer in offers if offer.cost <= _CALM * self._goal.limit]
        if not calm or calm[0].worth <= now.worth:
            self._calm_frames = 0
            return None
        self._calm_frames += 1
        return self._decide(calm[0], "to spare") if self._calm_frames >= _PATIENCE else None

    def _make_the_best_of(self, offers: list[Offer]) -> Decision | None:
        """Choose where no budget keeps the goal: the most right answers for what they cost.

        A cheaper budget runs at once, a dearer one when all have been far from the goal for a
        while: the cheapest may keep it soon. Word that this one stays waits longest.
        """
        now, best = self._offer(self.tokens), most_for_its_cost(offers)
        if best.value < _CLEARLY_MORE * now.value:
            best = now
        self._calm_frames = self._hopeful_frames = 0
        self._hopeless_frames += 1
        if best.cost < now.cost:
            return self._decide(best, "no budget keeps the goal")
        if best is now and (self._given_up or self._hopeless_frames < _LONG):
            return None
        near = min(offer.cost for offer in offers) <= self._goal.limit / _CALM
        if best is not now and (near or self._hopeless_frames < _PATIENCE):
            return None
        return self._decide(best, "no budget keeps the goal")

    def _decide(self, offer: Offer, why: str) -> Decision:
        goal, before = self._goal, self.tokens
        keeps_goal = offer.cost <= goal.limit
        change = (
            f"{before} stay, accuracy {tell_accuracy(self.accuracy[before])}"
            if offer.tokens == before
            else f"now {offer.tokens}, accuracy {tell_accuracy(self.accuracy[before])} -> "
            f"{tell_accuracy(self.accuracy[offer.tokens])}"
        )
        if not keeps_goal and offer.accuracy is not None:
            change += f", the most right answers a {goal.unit}"
        reason = (
            f"{why}: {goal.tell(self.predicted(before))} with {before} visual tokens "
            f"(goal {goal.tell(goal.limit)}, load {self._load.mean:.2f}); {change}"
        )
        decision = Decision(offer.tokens, before, keeps_goal, reason)
        self.tokens, self._given_up = offer.tokens, not keeps_goal
        self._calm_frames = self._hopeless_frames = self._hopeful_frames = 0
        self.decisions.append(decision)
        _log.warning("budget: %s", reason)
        return decision


def tell_accuracy(accuracy: float | None) -> str:
    """Return a share of right answers in words."""
    return "unknown" if accuracy is None else f"{accuracy:.1%}"
