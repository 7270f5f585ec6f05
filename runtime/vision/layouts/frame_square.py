"""The layout of a clip's frame in LLaVA-OneVision: one square, whose tokens are pooled.

As transformers' `LlavaOnevisionVideoProcessor` and `get_video_features`: the frame is squeezed into
the square, and all its tokens are scaled down bilinearly to half the rows and columns. A reducer
has bounded the tokens already; what it left is not pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime.vision.layouts.layout import Size
from runtime.vision.layouts.scaled_down import pool_squares
from runtime.vision.layouts.square import Square
from runtime.vision.visual_tokens import VisualTokens


@dataclass(frozen=True)
class FrameSquare(Square):
    """One square of a frame.

    Attributes:
        pooled: rows and columns that all tokens are pooled to; None: a reducer left some out.
    """

    pooled: tuple[int, int] | None

    def assemble(self, squares: VisualTokens, sizes: Sequence[Size]) -> VisualTokens:
        """Return the tokens of each frame."""
        if self.pooled is not None:
            squares = pool_squares(squares, (self.patch_rows, self.patch_columns), self.pooled)
        return replace(squares, shown="frame")
