"""Recordings for calibration: drives over a photograph, as pictures, videos and bags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.manifest import Preprocessing
from tests.runtime.conftest import make_message, write_bag

__all__ = ["make_message", "write_bag"]


def make_preprocessing(side: int = 56) -> Preprocessing:
    return Preprocessing(
        resize_height=side,
        resize_width=side,
        height=side,
        width=side,
        rescale_factor=1 / 255,
        mean=(0.5, 0.4, 0.3),
        std=(0.25, 0.25, 0.25),
    )


def drive_over(photograph: np.ndarray, frames: int, side: int = 96) -> list[np.ndarray]:
    """Return windows along the diagonal of a photograph, uint8[side, side, 3] each."""
    rows = np.linspace(0, photograph.shape[0] - side, frames).astype(int)
    columns = np.linspace(0, photograph.shape[1] - side, frames).astype(int)
    return [
        photograph[row : row + side, column : column + side]
        for row, column in zip(rows, columns, strict=True)
    ]


@pytest.fixture(scope="session")
def write_folder(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Sequence[np.ndarray]], Path]:
    def write(pictures: Sequence[np.ndarray]) -> Path:
        folder = tmp_path_factory.mktemp("pictures")
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"frame{number}.png")
        return folder

    return write


@pytest.fixture
def write_clip(tmp_path: Path) -> Callable[[Sequence[np.ndarray]], Path]:
    """Write a video of given pictures, at 10 frames per second."""
    av: Any = pytest.importorskip("av")

    def write(pictures: Sequence[np.ndarray]) -> Path:
        path = tmp_path / "drive.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.pix_fmt = "yuv420p"
            stream.height, stream.width = pictures[0].shape[:2]
            stream.bit_rate = 4_000_000
            for picture in pictures:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write
