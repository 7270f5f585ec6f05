"""The cost of a frame, and the limit that it must keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engines.errors import OptionError


@dataclass(frozen=True)
class FrameCost:
    """What a frame costs with one budget.

    Attributes:
        first_token_ms: from pixels to the first token of the answer.
        token_ms: for each token after that.
        watts: drawn meanwhile; None where nobody measures it.
        noise: by which share of these times equal work is known to differ.
    """

    first_token_ms: float
    token_ms: float = 0.0
    watts: float | None = None
    noise: float = 0.0


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

    @property
    def unit(self) -> str:
        """What is spent."""
        return "watt" if self.kind == "power" else "millisecond"

    def cost_of(self, cost: FrameCost, answer_tokens: float) -> float:
        """Return what counts of a cost: ms, ms for each token of an answer, or watts."""
        if self.kind == "latency":
            return cost.first_token_ms
        if self.kind == "rate":
            return cost.first_token_ms / answer_tokens + cost.token_ms
        return cost.watts or 0.0

    def noise_of(self, cost: FrameCost) -> float:
        """Return the share by which what counts is uncertain; of watts nobody measures it."""
        return 0.0 if self.kind == "power" else cost.noise

    def tell(self, amount: float) -> str:
        """Return an amount of `cost_of` in words."""
        if self.kind == "latency":
            return f"{amount:.0f} ms"
        return f"{1e3 / amount:.1f} tokens/s" if self.kind == "rate" else f"{amount:.1f} W"
