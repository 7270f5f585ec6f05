"""Scenes rendered once and kept on disk, so that training never waits for the renderer.

A seed and a count enter; memory-mapped arrays leave. A finished store is found again by its name.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from layout import GRID_SIZE, IMAGE_SIZE, MAX_OBJECTS_DENSE, array_from_layout
from scenes import generate_scene

_CHUNK = 500

Columns = Mapping[str, tuple[type[np.generic], tuple[int, ...]]]
Row = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class SceneStore:
    """Rendered scenes.

    Attributes:
        images: uint8[N, IMAGE_SIZE, IMAGE_SIZE, 3].
        labels: int8[N, GRID_SIZE ** 2], see `scenes.label_patches`.
        objects: float32[N, 8, 4], see `layout.array_from_layout`.
    """

    images: np.ndarray
    labels: np.ndarray
    objects: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> SceneStore:
        """Return the first `count` scenes."""
        return SceneStore(self.images[:count], self.labels[:count], self.objects[:count])


def open_store(folder: Path, name: str, seed: int, count: int, dense: bool = False) -> SceneStore:
    """Open the store `name`, rendering it first if it is not there yet."""
    columns: Columns = {
        "images": (np.uint8, (IMAGE_SIZE, IMAGE_SIZE, 3)),
        "labels": (np.int8, (GRID_SIZE**2,)),
        "objects": (np.float32, (MAX_OBJECTS_DENSE, 4)),
    }
    place = folder / f"{name}-{seed}-{count}"
    return SceneStore(*open_arrays(place, columns, count, partial(_draw_row, seed, dense)))


def _draw_row(seed: int, dense: bool, index: int) -> Row:
    layout, image, label = generate_scene(seed, index, dense)
    return image, label, array_from_layout(layout)


def open_arrays(
    place: Path, columns: Columns, count: int, draw: Callable[[int], Row]
) -> list[np.ndarray]:
    """Open the arrays kept under `place`, drawing them in two processes if they are not there.

    Args:
        place: a folder; a file in it says that it is complete.
        columns: type and shape of a row of each array, by name.
        count: rows.
        draw: returns row `index` of every array; it is sent to other processes.

    Returns:
        For each column, an array [count, ...] that is read from disk as it is used.
    """
    files = [place / f"{name}.npy" for name in columns]
    if not (place / "complete").exists():
        place.mkdir(parents=True, exist_ok=True)
        for file, (dtype, shape) in zip(files, columns.values(), strict=True):
            np.lib.format.open_memmap(file, "w+", dtype, (count, *shape)).flush()
        chunks = [
            (files, draw, start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)
        ]
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            pool.starmap(_draw_chunk, chunks)
        (place / "complete").touch()
    return [np.load(file, mmap_mode="r") for file in files]


def _draw_chunk(files: list[Path], draw: Callable[[int], Row], start: int, stop: int) -> None:
    arrays = [np.load(file, mmap_mode="r+") for file in files]
    for index in range(start, stop):
        for array, value in zip(arrays, draw(index), strict=True):
            array[index] = value
