"""What a bundle says of a picture that becomes several squares, and how many tokens they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from engines.manifest_fields import Record, RelativePath, Side

NEWLINE = "image_newline"
"""Name of the one tensor in `PictureTiles.newline`."""

_MOST_SQUARES = 65

Newlines = Literal["rows", "none"]
Resolution = tuple[Side, Side]


@dataclass(frozen=True)
class TileGrid:
    """Tiles that lie side by side, beside the view of the whole picture.

    Attributes:
        rows: of tiles.
        columns: of tiles.
    """

    rows: int
    columns: int

    @property
    def squares(self) -> int:
        """The tiles and the view of the whole picture."""
        return 1 + self.rows * self.columns


class PictureTiles(Record):
    """LLaVA-NeXT's layout ("anyres"): one view of the whole picture, and tiles of a larger one.

    The picture is scaled into the best of ``resolutions``, centred on black, and cut into squares.
    """

    kind: Literal["llava_next"] = "llava_next"
    side: Side
    """Of a square, in pixels."""
    resolutions: tuple[Resolution, ...] = Field(min_length=1, max_length=256)
    """Height and width of each; multiples of ``side``."""
    newline: RelativePath
    """safetensors with one tensor ``image_newline``, float32[D]: what ends a row."""
    newlines: Newlines = "rows"
    """Where a reducer left tokens out: end every row that has a token, or none. All tokens always
    have them."""

    @model_validator(mode="after")
    def _check_resolutions(self) -> PictureTiles:
        for height, width in self.resolutions:
            grid = self.grid_of(height, width)
            if height % self.side or width % self.side or grid.squares > _MOST_SQUARES:
                raise ValueError(
                    f"has the resolution {height} x {width}, expected multiples of {self.side} "
                    f"pixels and at most {_MOST_SQUARES - 1} tiles"
                )
        return self

    def grid_of(self, height: int, width: int) -> TileGrid:
        """Return the tiles of a resolution."""
        return TileGrid(height // self.side, width // self.side)

    @property
    def most_squares(self) -> int:
        """Squares of the picture that has most of them."""
        return max(self.grid_of(*one).squares for one in self.resolutions)

    def most_tokens(self, of_a_square: int, patch_rows: int) -> int:
        """Return how many visual tokens a picture has at most, newlines included.

        Args:
            of_a_square: what the graph leaves of each.
            patch_rows: of a square.
        """
        grids = [self.grid_of(*one) for one in self.resolutions]
        return max(grid.squares * of_a_square + grid.rows * patch_rows for grid in grids)
