"""Options of the goal that chooses among a bundle's budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from engines.errors import OptionError

if TYPE_CHECKING:
    from runtime.camera.budgets.goal import Goal


@dataclass(frozen=True)
class GoalOptions:
    """What is to be kept by choosing among budgets; the help of each option says what it means."""

    latency_target: Annotated[
        str | None,
        typer.Option(
            help="Longest time to the first token, as 200ms: the most accurate of the bundle's "
            "token budgets that keeps it runs, and each choice is logged with what it costs in "
            "accuracy. Of several cameras, the share of each in a batch counts."
        ),
    ] = None
    tokens_per_second: Annotated[
        float | None,
        typer.Option(help="The same for tokens of answers per second at least, encoding included."),
    ] = None
    power: Annotated[
        str | None,
        typer.Option(
            help="The same for power at most, as 15W, on a Jetson, through tegrastats. Tested "
            "against recorded lines of Orin and Thor; it has never run on a Jetson."
        ),
    ] = None

    def goal(self) -> Goal | None:
        """Return the goal, if one is given.

        Raises:
            OptionError: several are, or one is not an amount.
        """
        from runtime.camera.budgets.goal import Goal

        goals = []
        if self.latency_target is not None:
            units = {"ms": 1.0, "s": 1e3, "": 1.0}
            goals.append(Goal("latency", _amount("--latency-target", self.latency_target, units)))
        if self.tokens_per_second is not None:
            goals.append(Goal("rate", self.tokens_per_second))
        if self.power is not None:
            units = {"mW": 1e-3, "W": 1.0, "": 1.0}
            goals.append(Goal("power", _amount("--power", self.power, units)))
        if len(goals) > 1:
            raise OptionError(
                "Give one of --latency-target, --tokens-per-second and --power: there is one "
                "budget to choose, and it cannot keep two goals."
            )
        return goals[0] if goals else None


def _amount(option: str, text: str, units: dict[str, float]) -> float:
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text.strip()[len(number) :]
    try:
        return float(number) * units[unit]
    except (ValueError, KeyError):
        known = ", ".join(unit for unit in units if unit)
        raise OptionError(
            f"{option} {text}: expected a number, with one of the units {known} behind it."
        ) from None
