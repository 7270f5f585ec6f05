"""What a bundle says of pictures that become several squares, and of clips beside them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from typing import Annotated, Literal

from pydantic import Field, model_validator

from engines.manifest_fields import Record, RelativePath, Side

NEWLINE = "image_newline"
"""Name of the one tensor in `PictureTiles.newline`."""
ALL_TOKENS = "none"
"""The reducer that leaves every token."""

MOST_CLIP_FRAMES = 64

_MOST_SQUARES = 65
_MOST_PICTURE_TOKENS = _MOST_SQUARES * 2**16
_SCALED_DOWN_FROM = 1.1
"""How many times too long a side may be before tokens are scaled down; transformers' number."""

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


class ClipFrames(Record):
    """LLaVA-OneVision's clips: a frame is one square, and all of them stand in one place.

    A newline follows the last one. All tokens of a frame are pooled, as in training; where a
    reducer left some out, they are those of single patches.
    """

    frames: Annotated[int, Field(ge=1, le=MOST_CLIP_FRAMES)] | None = None
    """How many the checkpoint's processor takes of a clip; None: it does not say."""

    def pooled(self, rows: int, columns: int) -> tuple[int, int]:
        """Return to how many rows and columns all tokens of a frame are pooled.

        Args:
            rows: of patches.
            columns: of them.
        """
        return ceil(rows / 2), ceil(columns / 2)


class PictureTiles(Record):
    """LLaVA-NeXT's layout ("anyres"): one view of the whole picture, and tiles of a larger one.

    The picture is scaled into the best of ``resolutions``, centred on black, and cut into squares.
    LLaVA-OneVision's ("anyres_max_9") is the same, with a bound on all tokens.
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
    most_tiles: Annotated[int, Field(ge=1)] | None = None
    """How many tiles' worth of tokens a picture has at most where no reducer leaves any out: more
    are scaled down. None: no limit."""
    picture_tokens: Annotated[int, Field(ge=1, le=_MOST_PICTURE_TOKENS)] | None = None
    """How many tokens a picture has at most, newlines not counted. Its squares share them: those
    with the largest `token_worth` are kept. None: each square has a budget of its own."""
    clips: ClipFrames | None = None
    """How a clip is seen; None: the checkpoint was not trained on any."""
    several: Literal["tiles", "squares"] = "tiles"
    """What becomes of each picture where a conversation has several: tiles as of one alone, or one
    square, padded, with a newline behind its tokens."""

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

    def scaled_down(self, rows: int, columns: int, patch_rows: int) -> tuple[int, int]:
        """Return to how many rows and columns all tokens of the tiles are scaled down.

        Args:
            rows: of patches that are not padding, over all tiles.
            columns: of them.
            patch_rows: of a square.
        """
        if self.most_tiles is None:
            return rows, columns
        ratio = sqrt(rows * columns / (self.most_tiles * patch_rows**2))
        if ratio <= _SCALED_DOWN_FROM:
            return rows, columns
        return int(rows // ratio), int(columns // ratio)

    def most_tokens(self, of_a_square: int, patch_rows: int, reducer: str) -> int:
        """Return how many visual tokens a picture has at most, newlines included.

        Args:
            of_a_square: what the graph leaves of each.
            patch_rows: of a square.
            reducer: its name.
        """
        grids = [self.grid_of(*one) for one in self.resolutions]
        if self.picture_tokens is not None:
            kept = [min(grid.squares * of_a_square, self.picture_tokens) for grid in grids]
            ended = [grid.rows * patch_rows for grid in grids]  # a row that is ended has a token
            return max(one + min(one, rows) for one, rows in zip(kept, ended, strict=True))
        most = max(grid.squares * of_a_square + grid.rows * patch_rows for grid in grids)
        if self.most_tiles is None or reducer != ALL_TOKENS:
            return most
        tiles = ceil(self.most_tiles * _SCALED_DOWN_FROM**2 * of_a_square)
        rows = max(grid.rows for grid in grids) * patch_rows
        return min(most, of_a_square + tiles + rows)
