"""Find the budgets that no other one beats in accuracy and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_LEAST_GAIN = 0.05
"""A share of the cost that is worth giving up accuracy for. The load of a machine that does
something else besides wavers by more than that from frame to frame: less decides nothing."""


@dataclass(frozen=True)
class Offer:
    """A budget and what is known of it.

    Attributes:
        tokens: the budget.
        cost: what a frame costs with it, in the unit of the goal.
        accuracy: its share of right answers. None in all offers that are compared where one is not
            known: more tokens are then taken to be more right.
        noise: share by which the cost is uncertain.
    """

    tokens: int
    cost: float
    accuracy: float | None = None
    noise: float = 0.0

    @property
    def worth(self) -> float:
        """What more accurate offers have more of."""
        return float(self.tokens) if self.accuracy is None else self.accuracy

    @property
    def value(self) -> float:
        """Right answers for each unit of the cost; where accuracy is not known, frames."""
        return (1.0 if self.accuracy is None else self.accuracy) / max(self.cost, 1e-9)

    def is_clearly_cheaper_than(self, other: Offer) -> bool:
        """Say whether it costs less by more than can be noise."""
        margin = max(self.noise, other.noise, _LEAST_GAIN)
        return self.cost < (1.0 - margin) * other.cost


def worthwhile(offers: Sequence[Offer]) -> list[Offer]:
    """Return the offers that are clearly cheaper than each more accurate one, most accurate first.

    This is the Pareto front, but for differences of cost that are no differences: of budgets that
    cost the same, the most accurate stays.
    """
    kept: list[Offer] = []
    for offer in sorted(offers, key=lambda offer: (-offer.worth, offer.cost)):
        if all(offer.is_clearly_cheaper_than(other) for other in kept):
            kept.append(offer)
    return kept


def most_for_its_cost(offers: Sequence[Offer]) -> Offer:
    """Return the offer of most `Offer.value`."""
    return max(offers, key=lambda offer: offer.value)
