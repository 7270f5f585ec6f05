"""Rendered pictures and clips kept on disk, as the tower looks at them.

A seed and a count enter; arrays that are read from disk leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from clips import FRAMES
from events import POOLED_GRID, Event, generate_event_clip
from layout import (
    GRID_SIZE,
    IMAGE_SIZE,
    MAX_OBJECTS_DENSE,
    Layout,
    array_from_layout,
    objects_from_array,
)
from pictures import PictureScene, generate_picture, shrink
from scene_store import Columns, Row, open_arrays
from signs import MAX_SIGNS, TILE_SIZE, array_from_signs, signs_from_array


@dataclass(frozen=True)
class PictureStore:
    """Rendered pictures.

    Attributes:
        images: uint8[N, 192, 192, 3].
        bases: uint8[N, 96, 96, 3], see `pictures.shrink`.
        labels: int8[N, 576] and base_labels: int8[N, 144], see `pictures.Picture`.
        objects: float32[N, 8, 4], see `layout.array_from_layout`.
        signs: int16[N, 4, 4], see `signs.array_from_signs`.
    """

    images: np.ndarray
    bases: np.ndarray
    labels: np.ndarray
    base_labels: np.ndarray
    objects: np.ndarray
    signs: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def scene(self, index: int) -> PictureScene:
        """Return what picture `index` shows."""
        return PictureScene(
            objects_from_array(self.objects[index]), signs_from_array(self.signs[index])
        )


def open_pictures(
    folder: Path, name: str, seed: int, count: int, dense: bool = False
) -> PictureStore:
    """Open the store `name`, rendering it first if it is not there yet."""
    columns: Columns = {
        "images": (np.uint8, (IMAGE_SIZE, IMAGE_SIZE, 3)),
        "bases": (np.uint8, (TILE_SIZE, TILE_SIZE, 3)),
        "labels": (np.int8, (GRID_SIZE**2,)),
        "base_labels": (np.int8, ((GRID_SIZE // 2) ** 2,)),
        "objects": (np.float32, (MAX_OBJECTS_DENSE, 4)),
        "signs": (np.int16, (MAX_SIGNS, 4)),
    }
    place = folder / f"{name}-{seed}-{count}"
    return PictureStore(*open_arrays(place, columns, count, partial(_picture_row, seed, dense)))


def _picture_row(seed: int, dense: bool, index: int) -> Row:
    drawn = generate_picture(seed, index, dense)
    objects = array_from_layout(Layout(0.0, drawn.scene.objects))
    signs = array_from_signs(drawn.scene.signs)
    return drawn.image, shrink(drawn.image), drawn.labels, drawn.base_labels, objects, signs


@dataclass(frozen=True)
class ClipStore:
    """Rendered clips.

    Attributes:
        frames: uint8[N, FRAMES, 96, 96, 3].
        labels: int8[N, FRAMES, 36], see `events.EventClip`.
        actors: int8[N, 2, 3] rows of (kind, event, late).
    """

    frames: np.ndarray
    labels: np.ndarray
    actors: np.ndarray

    def __len__(self) -> int:
        return len(self.frames)

    def events(self, index: int) -> tuple[Event, ...]:
        """Return what happens in clip `index`."""
        rows = self.actors[index]
        return tuple(Event(int(kind), int(event), bool(late)) for kind, event, late in rows)


def open_clips(folder: Path, name: str, seed: int, count: int) -> ClipStore:
    """Open the store `name`, rendering it first if it is not there yet."""
    columns: Columns = {
        "frames": (np.uint8, (FRAMES, TILE_SIZE, TILE_SIZE, 3)),
        "labels": (np.int8, (FRAMES, POOLED_GRID**2)),
        "actors": (np.int8, (2, 3)),
    }
    place = folder / f"{name}-{seed}-{count}"
    return ClipStore(*open_arrays(place, columns, count, partial(_clip_row, seed)))


def _clip_row(seed: int, index: int) -> Row:
    clip = generate_event_clip(seed, index)
    actors = np.array([(item.kind, item.event, item.late) for item in clip.events], np.int8)
    return clip.frames, clip.labels, actors
