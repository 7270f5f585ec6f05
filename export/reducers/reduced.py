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
    """

    tokens: Tensor
    valid: Tensor
    origin: Tensor
    assignment: Tensor
