"""The result of every reducer: the tokens that are left and where they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from export.towers import Scoring, TowerOutput


@dataclass(frozen=True)
class Reduced:
    """The visual tokens that are left of a batch of pictures.

    Attributes:
        tokens: float[B, N, D]; padded with zeros beyond ``valid``.
        valid: int64[B]; how many of the N tokens are real.
        origin: int64[B, N]; the patch a token stands for, -1 where it stands for no single patch
            (class token, merged token, padding).
        assignment: int64[B, P]; what became of each patch. ``slot >= 0``: it is the patch that
            token ``slot`` was made from (kept, or the target others were merged into);
            ``-(slot + 2)``: merged into token ``slot``; ``-1``: in no token.
    """

    tokens: Tensor
    valid: Tensor
    origin: Tensor
    assignment: Tensor


class Reducer(Protocol):
    """A pure function of tensors with static output shapes; a frozen dataclass of its options."""

    @property
    def name(self) -> str:
        """The registry name, for example ``"visionzip"``."""

    @property
    def scoring(self) -> Scoring:
        """Which attention row and keys the tower must compute for it."""

    @property
    def options(self) -> dict[str, int | float | str | bool]:
        """What `make_reducer` takes to make it again; the manifest records it."""

    def token_count(self, patches: int) -> int:
        """Return N for a tower of ``patches`` patches.

        Raises:
            OptionError: the budget does not fit that many patches.
        """

    def __call__(self, tower: TowerOutput) -> Reduced:
        """Reduce a batch."""
