"""What every reducer is built on: its options, checked when it is made, and its budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Any, ClassVar

from engines.errors import OptionError
from export.reducers.reduced import Reduced
from export.towers import Scoring, TowerOutput

OptionValue = int | float | str | bool


@dataclass(frozen=True)
class Reducer(ABC):
    """A pure function of tensors with static output shapes; a frozen dataclass of its options.

    A reducer sets `name`, `scoring` (what the tower is to compute for it) and `LEAST`, its
    whole-number options and the least value of each, and extends `problems` where there is more to
    check. It sets `weighs` where it says `Reduced.worth`.
    """

    name: ClassVar[str]
    scoring: ClassVar[Scoring]
    weighs: ClassVar[bool] = False
    LEAST: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            OptionError: one or more options cannot be served; all are named.
        """
        problems = self.problems()
        if problems:
            raise OptionError(f"reducer {self.name}: {'; '.join(problems)}.")

    def problems(self) -> list[str]:
        """Return what is wrong with the options, one phrase each."""
        return [
            f"{option} is {value!r}, expected a whole number of {least} or more"
            for option, least in self.LEAST.items()
            if not is_whole(value := getattr(self, option)) or value < least
        ]

    @property
    def options(self) -> dict[str, OptionValue]:
        """What `make_reducer` takes to make this reducer again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def ranks(self) -> bool:
        """Whether `Reduced.order` says in which order the tokens were taken."""
        return False

    def serves(self, other: Reducer) -> bool:
        """Return whether the first tokens of this one's ranking are what another one leaves."""
        return False

    @abstractmethod
    def token_count(self, patches: int) -> int:
        """Return N for a tower of ``patches`` patches.

        Raises:
            OptionError: the options do not fit that many patches.
        """

    @classmethod
    @abstractmethod
    def options_for(cls, tokens: int | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the options the user gave to leave ``tokens`` tokens."""

    @abstractmethod
    def __call__(self, tower: TowerOutput) -> Reduced:
        """Reduce a batch."""

    def check_budget(self, tokens: int, patches: int, merged: int = 0) -> int:
        """Return ``tokens`` if a tower of ``patches`` patches can give as many.

        Args:
            tokens: asked for.
            patches: of the tower.
            merged: tokens there may be beside the patches.

        Raises:
            OptionError: it cannot.
        """
        if tokens > patches + merged:
            most = f"{patches} + {merged}" if merged else f"{patches}"
            raise OptionError(
                f"reducer {self.name}: a budget of {tokens} tokens is more than the {patches} "
                f"patches the tower has. Ask for at most {most}."
            )
        return tokens


@dataclass(frozen=True)
class BudgetReducer(Reducer):
    """A reducer that is told one number: how many tokens to leave.

    Attributes:
        budget: N.
    """

    budget: int

    LEAST: ClassVar[Mapping[str, int]] = {"budget": 1}

    def token_count(self, patches: int) -> int:
        """Return N for a tower of ``patches`` patches.

        Raises:
            OptionError: the budget is larger than that.
        """
        return self.check_budget(self.budget, patches)

    def serves(self, other: Reducer) -> bool:
        """Return whether they rank and differ only in the budget, and this one's is larger."""
        if not self.ranks or not isinstance(other, type(self)) or other.budget >= self.budget:
            return False
        return replace(other, budget=self.budget) == self

    @classmethod
    def options_for(cls, tokens: int | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the options the user gave to leave ``tokens`` tokens."""
        return {"budget": tokens, **given} if tokens is not None else dict(given)


def is_number(value: object) -> bool:
    """Return whether a value is a finite number (a boolean is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def is_whole(value: object) -> bool:
    """Return whether a value is an integer (a boolean is not)."""
    return isinstance(value, int) and not isinstance(value, bool)
