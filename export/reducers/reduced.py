"""The result of every reducer: the tokens that are left and where they came from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
        order: int64[B, N] where the reducer ranks, else None; each token's place in the ranking, 0
            for the first, -1 for padding. The tokens whose place is below n are what the same
            reducer leaves with a budget of n (where it takes several patches a step, n ends a
            step), so one pass serves every smaller budget.
        worth: float32[B, N] where the reducer weighs, else None; what each token added when it was
            taken, 0 or more. It never rises along the ranking, so what is worth more than any
            number is the beginning of it. 0 for padding. Pictures that one reducer saw can be
            compared, which is how the squares of one share a budget.
    """

    tokens: Tensor
    valid: Tensor
    origin: Tensor
    assignment: Tensor
    order: Tensor | None = None
    worth: Tensor | None = None
