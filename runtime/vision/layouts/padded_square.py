"""The layout of one of several pictures in LLaVA-OneVision: one square, with a newline behind it.

As transformers' `LlavaOnevisionImageProcessor` and `pack_image_features` where a conversation has
several pictures: each is padded to a square in the mean colour, and none is cut into tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.vision.layouts.layout import Size
from runtime.vision.layouts.square import Square
from runtime.vision.visual_tokens import VisualTokens


@dataclass(frozen=True)
class PaddedSquare(Square):
    """One padded square of a picture.

    Attributes:
        newline: float32[D], what ends its tokens; None: nothing does.
    """

    newline: NDArray[np.float32] | None

    def assemble(self, squares: VisualTokens, sizes: Sequence[Size]) -> VisualTokens:
        """Return the tokens of each picture, the newline behind the last real one."""
        count, slots, width = squares.tokens.shape
        ends = 0 if self.newline is None else 1
        tokens = np.zeros((count, slots + ends, width), np.float32)
        tokens[:, :slots] = squares.tokens
        if self.newline is not None:
            tokens[np.arange(count), squares.valid] = self.newline
        return VisualTokens(
            tokens=tokens,
            valid=squares.valid + ends,
            origin=np.pad(squares.origin, ((0, 0), (0, ends)), constant_values=-1),
            assignment=squares.assignment,
            milliseconds=squares.milliseconds,
            square_budget=slots,
            shown="among_others",
        )
