"""Where the objects of a scene stand: colours, shapes, positions, and how they are drawn at random.

A random generator enters, a frozen `Layout` leaves. Nothing here knows about pixels colours or
questions, so a layout can be rejected, listed and asked about without rendering it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 192
PATCH_SIZE = 8
GRID_SIZE = IMAGE_SIZE // PATCH_SIZE

COLORS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("ball", "box", "cone", "cylinder")
KIND_COUNT = len(COLORS) * len(SHAPES)
MAX_OBJECTS = 4
MAX_OBJECTS_DENSE = 8

# The corridor ahead of the robot, as a distance from the image centre in image widths. Layouts
# with an object between the two bounds are not asked about.
CORRIDOR_BLOCKED = 0.15
CORRIDOR_CLEAR = 0.21


@dataclass(frozen=True)
class SceneObject:
    """One object on the floor.

    Attributes:
        kind: colour and shape in one number, `color * len(SHAPES) + shape`.
        x: horizontal centre in pixels.
        base_y: where it touches the floor, in pixels from the top; larger is nearer.
        radius: half its size in pixels.
    """

    kind: int
    x: float
    base_y: float
    radius: float

    @property
    def color(self) -> int:
        """The index of its colour in `COLORS`."""
        return self.kind // len(SHAPES)

    @property
    def shape(self) -> int:
        """The index of its shape in `SHAPES`."""
        return self.kind % len(SHAPES)

    @property
    def name(self) -> str:
        """What it is called, such as "red ball"."""
        return f"{COLORS[self.color]} {SHAPES[self.shape]}"

    @property
    def center_y(self) -> float:
        """Its vertical centre in pixels."""
        return self.base_y - 0.9 * self.radius


@dataclass(frozen=True)
class Layout:
    """The geometry of a scene: the height of the horizon in pixels, and objects far to near."""

    horizon: float
    objects: tuple[SceneObject, ...]


def draw_layout(rng: np.random.Generator, dense: bool = False) -> Layout:
    """Draw a layout of distinct objects that barely overlap.

    Args:
        rng: the only source of randomness.
        dense: up to 8 objects, for training the tower on parts of a picture, rather than 1 to 4.
    """
    limit = MAX_OBJECTS_DENSE if dense else MAX_OBJECTS
    count = int(rng.integers(1, limit + 1))
    keep_clear = not dense and rng.random() < 0.34
    kinds = _draw_kinds(rng, count)
    while True:
        horizon = float(rng.uniform(44, 76))
        objects = _place_objects(rng, kinds, horizon, keep_clear)
        if objects is not None:
            return Layout(horizon, tuple(sorted(objects, key=lambda item: item.base_y)))


def _draw_kinds(rng: np.random.Generator, count: int) -> list[int]:
    """Draw distinct kinds; often several of one shape, so that counting a shape is a question."""
    kinds = list(rng.permutation(KIND_COUNT))
    if count > 1 and rng.random() < 0.5:
        shape = int(rng.integers(len(SHAPES)))
        repeated = min(int(rng.integers(2, count + 1)), len(COLORS))
        same = [kind for kind in kinds if kind % len(SHAPES) == shape]
        others = [kind for kind in kinds if kind % len(SHAPES) != shape]
        kinds = same[:repeated] + others
    return [int(kind) for kind in kinds[:count]]


def _place_objects(
    rng: np.random.Generator, kinds: list[int], horizon: float, keep_clear: bool
) -> list[SceneObject] | None:
    """Place every kind at random, or return None when one of them found no room."""
    placed: list[SceneObject] = []
    for kind in kinds:
        for _ in range(30):
            base_y = float(rng.uniform(horizon + 18, IMAGE_SIZE - 2))
            nearness = (base_y - horizon) / (IMAGE_SIZE - horizon)
            radius = float((8.6 + 4.8 * nearness) * rng.uniform(0.9, 1.15))
            x = float(rng.uniform(radius + 2, IMAGE_SIZE - radius - 2))
            candidate = SceneObject(kind, x, base_y, radius)
            in_corridor = abs(x / IMAGE_SIZE - 0.5) < CORRIDOR_CLEAR
            if not (keep_clear and in_corridor) and _has_room(candidate, placed):
                placed.append(candidate)
                break
        else:
            return None
    return placed


def _has_room(candidate: SceneObject, placed: list[SceneObject]) -> bool:
    return all(
        np.hypot(candidate.x - other.x, candidate.center_y - other.center_y)
        > 1.05 * (candidate.radius + other.radius)
        for other in placed
    )


def array_from_layout(layout: Layout, slots: int = MAX_OBJECTS_DENSE) -> np.ndarray:
    """Return `float32[slots, 4]` rows of (kind, x, base_y, radius), -1 where there is no object."""
    rows = np.full((slots, 4), -1, np.float32)
    for row, item in zip(rows, layout.objects, strict=False):
        row[:] = (item.kind, item.x, item.base_y, item.radius)
    return rows


def objects_from_array(rows: np.ndarray) -> tuple[SceneObject, ...]:
    """Invert `array_from_layout`."""
    return tuple(
        SceneObject(int(kind), float(x), float(base_y), float(radius))
        for kind, x, base_y, radius in rows
        if kind >= 0
    )
