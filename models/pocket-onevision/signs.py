"""Small signs in a scene: a coloured plate with a pattern that only a tile of the picture shows.

A random generator and a layout enter; signs, and painted pictures, leave. A pattern's lines are one
pixel wide and all patterns are equally bright on the mean, so in a picture of half the size every
sign is the same flat plate: its colour can be read there, its pattern cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from layout import COLORS, IMAGE_SIZE, SceneObject
from scenes import OBJECT_RGB

TILE_SIZE = 96  # pixels; pictures have twice that
SIGN_SIZE = 12
PATTERNS = ("stripes", "bars", "checks", "dots")
MAX_SIGNS = 4

_ROW, _COLUMN = np.mgrid[0:SIGN_SIZE, 0:SIGN_SIZE] % 2
_BRIGHT = {
    "stripes": np.where(_ROW == 0, 1.1, 0.4),
    "bars": np.where(_COLUMN == 0, 1.1, 0.4),
    "checks": np.where(_ROW == _COLUMN, 1.1, 0.4),
    "dots": np.where(_ROW + _COLUMN == 0, 1.2, 0.6),
}


@dataclass(frozen=True)
class Sign:
    """One sign: indices into `COLORS` and `PATTERNS`, and its top left corner in even pixels."""

    color: int
    pattern: int
    x: int
    y: int

    @property
    def name(self) -> str:
        """What it is called, such as "red sign with checks"."""
        return f"{COLORS[self.color]} sign with {PATTERNS[self.pattern]}"


def draw_signs(rng: np.random.Generator, objects: Sequence[SceneObject]) -> tuple[Sign, ...]:
    """Draw 1 to 4 signs of different colours, clear of objects and each other, each in one tile.

    Fewer are returned where the objects leave no room.
    """
    count = int(rng.integers(1, MAX_SIGNS + 1))
    repeated = int(rng.integers(len(PATTERNS))) if rng.random() < 0.5 else None
    placed: list[Sign] = []
    for color in rng.permutation(len(COLORS))[:count]:
        same = repeated is not None and rng.random() < 0.6
        pattern = repeated if same and repeated is not None else int(rng.integers(len(PATTERNS)))
        for _ in range(40):
            x, y = (int(value) for value in 2 * rng.integers(1, IMAGE_SIZE // 2 - 7, 2))
            sign = Sign(int(color), pattern, x, y)
            if _has_room(sign, objects, placed):
                placed.append(sign)
                break
    return tuple(placed)


def _has_room(sign: Sign, objects: Sequence[SceneObject], placed: Sequence[Sign]) -> bool:
    in_one_tile = max(sign.x % TILE_SIZE, sign.y % TILE_SIZE) <= TILE_SIZE - SIGN_SIZE
    x, y = sign.x + SIGN_SIZE / 2, sign.y + SIGN_SIZE / 2
    apart = all(max(abs(sign.x - other.x), abs(sign.y - other.y)) > 18 for other in placed)
    return (
        in_one_tile
        and apart
        and all(np.hypot(x - o.x, y - o.center_y) > 1.5 * o.radius + 9 for o in objects)
    )


def paint_sign(
    image: np.ndarray, owner: np.ndarray, sign: Sign, number: int, rng: np.random.Generator
) -> None:
    """Paint one sign into `image`, and its number into `owner`, in place."""
    area = np.s_[sign.y : sign.y + SIGN_SIZE, sign.x : sign.x + SIGN_SIZE]
    tint = (OBJECT_RGB[sign.color] + rng.uniform(-12, 12, 3)) * rng.uniform(0.9, 1.05)
    image[area] = _BRIGHT[PATTERNS[sign.pattern]][..., None] * tint
    owner[area] = number


def array_from_signs(signs: Sequence[Sign]) -> np.ndarray:
    """Return `int16[MAX_SIGNS, 4]` rows of (color, pattern, x, y), -1 where there is no sign."""
    rows = np.full((MAX_SIGNS, 4), -1, np.int16)
    for row, sign in zip(rows, signs, strict=False):
        row[:] = (sign.color, sign.pattern, sign.x, sign.y)
    return rows


def signs_from_array(rows: np.ndarray) -> tuple[Sign, ...]:
    """Invert `array_from_signs`."""
    return tuple(Sign(*(int(value) for value in row)) for row in rows if row[0] >= 0)
