"""Detect whether the scene has changed since the frame last encoded, before any network is run.

A frame is sampled to a grid of blocks. The largest change of a block's mean brightness decides, so
that something small that moves is noticed while sensor noise averages out. What counts as noise is
learned from the first seconds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.vision import Pixels

Blocks = NDArray[np.float32]

_COLUMNS = 32
_SAMPLES = 4
"""Samples along each side of a block."""
_LEAST, _MOST = 2.0, 10.0
"""Grey levels between which the threshold may lie, whatever the first seconds showed."""
_TIMES_NOISE = 3.0


@dataclass(frozen=True)
class StillnessOptions:
    """When a scene counts as still.

    Attributes:
        learn_s: seconds from the first frame in which every frame counts as changed.
        refresh_s: after that long a frame counts as changed though nothing moved.
    """

    learn_s: float = 2.0
    refresh_s: float = 10.0


class Stillness:
    """Compares frames with the last one that was encoded.

    Attributes:
        threshold: grey levels of the most changed block above which a scene has changed; None
            while it is being learned.
    """

    def __init__(self, options: StillnessOptions | None = None) -> None:
        self.threshold: float | None = None
        self._options = options or StillnessOptions()
        self._noise: list[float] = []
        self._learning_since_s: float | None = None
        self._previous: Blocks | None = None
        self._reference: Blocks | None = None
        self._reference_s = 0.0

    def has_changed(self, image: Pixels) -> bool:
        """Say whether the frame must be encoded; then it becomes what later ones are compared to.

        Args:
            image: uint8[H, W, 3]; a change of size is a change of scene.
        """
        now_s = time.monotonic()
        blocks = block_means(image)
        self._learn(blocks, now_s)
        reference = self._reference
        if (
            self.threshold is not None
            and reference is not None
            and now_s - self._reference_s < self._options.refresh_s
            and largest_change(blocks, reference) <= self.threshold
        ):
            return False
        self._reference, self._reference_s = blocks, now_s
        return True

    def _learn(self, blocks: Blocks, now_s: float) -> None:
        if self.threshold is not None:
            return
        if self._learning_since_s is None:
            self._learning_since_s = now_s
        if self._previous is not None:
            self._noise.append(largest_change(blocks, self._previous))
        self._previous = blocks
        if now_s - self._learning_since_s >= self._options.learn_s and self._noise:
            noise = float(np.median(self._noise))
            self.threshold = min(max(_TIMES_NOISE * noise, _LEAST), _MOST)
            self._noise.clear()


def block_means(image: Pixels) -> Blocks:
    """Return the mean brightness of a grid of blocks, float32[rows, 32] in grey levels.

    Args:
        image: uint8[H, W, 3]; smaller than 32 pixels it is compared pixel by pixel.
    """
    step = max(image.shape[1] // (_COLUMNS * _SAMPLES), 1)
    green = image[::step, ::step, 1].astype(np.float32)  # [h, w]: most of the brightness
    rows, columns = green.shape[0] // _SAMPLES, green.shape[1] // _SAMPLES
    if not rows or not columns:
        return green
    whole = green[: rows * _SAMPLES, : columns * _SAMPLES]
    means: Blocks = whole.reshape(rows, _SAMPLES, columns, _SAMPLES).mean(axis=(1, 3))
    return means


def largest_change(blocks: Blocks, others: Blocks) -> float:
    """Return the change of the most changed block in grey levels; infinite for another size."""
    if blocks.shape != others.shape:
        return float("inf")
    return float(np.abs(blocks - others).max())


def changed_share(blocks: Blocks, others: Blocks, threshold: float) -> float:
    """Return the share of blocks that differ by more than ``threshold`` grey levels, 0 to 1."""
    if blocks.shape != others.shape:
        return 1.0
    return float((np.abs(blocks - others) > threshold).mean())
