"""Scenes rendered once and kept on disk, so that training never waits for the renderer.

A seed and a count enter; memory-mapped arrays leave. A finished store is found again by its name.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from layout import GRID_SIZE, IMAGE_SIZE, MAX_OBJECTS_DENSE, array_from_layout
from scenes import generate_scene

_CHUNK = 500


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
    place = folder / f"{name}-{seed}-{count}"
    files = [place / f"{part}.npy" for part in ("images", "labels", "objects")]
    if not (place / "complete").exists():
        _render_store(files, seed, count, dense)
        (place / "complete").touch()
    return SceneStore(*(np.load(file, mmap_mode="r") for file in files))


def _render_store(files: list[Path], seed: int, count: int, dense: bool) -> None:
    shapes = [
        (np.uint8, (count, IMAGE_SIZE, IMAGE_SIZE, 3)),
        (np.int8, (count, GRID_SIZE**2)),
        (np.float32, (count, MAX_OBJECTS_DENSE, 4)),
    ]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, (dtype, shape) in zip(files, shapes, strict=True):
        np.lib.format.open_memmap(file, "w+", dtype, shape).flush()
    chunks = [
        (files, seed, start, min(start + _CHUNK, count), dense) for start in range(0, count, _CHUNK)
    ]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_render_chunk, chunks)


def _render_chunk(files: list[Path], seed: int, start: int, stop: int, dense: bool) -> None:
    images, labels, objects = (np.load(file, mmap_mode="r+") for file in files)
    for index in range(start, stop):
        layout, image, label = generate_scene(seed, index, dense)
        images[index], labels[index] = image, label
        objects[index] = array_from_layout(layout)
