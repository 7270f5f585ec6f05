"""Compare how two frames look: the same picture again, the same view, or another.

A signature is the frame averaged to 16 x 16 coloured blocks, and frames are compared by the
difference of their blocks. Perceptual hashes (aHash, dHash, pHash) ignore brightness and colour on
purpose, but a room with its lights off gives a quantizer other values than with its lights on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.vision import Pixels

Signature = NDArray[np.int16]
"""int16[16, 16, 3], levels of 255."""

SIDE = 16
"""Blocks along each side of a signature: 21 pixels each at 336, over which sensor noise cancels."""

SAME_PICTURE = 8
"""Levels of 255 the most changed block may differ by in a near-duplicate. It is the largest and not
the mean, so that something small that moves before a still camera makes another picture."""

SAME_VIEW = 16.0
"""Levels of 255 that blocks may differ by on average within one view (a scene)."""


def sign_frame(levels: Pixels) -> Signature:
    """Return the signature of a frame, uint8[H, W, 3]."""
    blocks = Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(blocks).astype(np.int16)


def is_repeated(signature: Signature, others: Sequence[Signature]) -> bool:
    """Say whether a frame shows the same picture as one of the others."""
    if not others:
        return False
    changes = np.abs(np.stack(others) - signature).max(axis=(1, 2, 3))
    return bool((changes <= SAME_PICTURE).any())


def measure_change(signature: Signature, other: Signature) -> float:
    """Return by how many levels of 255 the blocks of two frames differ on average."""
    return float(np.abs(signature - other).mean())


def count_scenes(signatures: Sequence[Signature]) -> int:
    """Count the different views: a frame far from the first frame of every view begins another."""
    leaders: list[Signature] = []
    for signature in signatures:
        if all(measure_change(signature, leader) > SAME_VIEW for leader in leaders):
            leaders.append(signature)
    return len(leaders)
