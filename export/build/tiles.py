"""Checkpoints whose pictures are cut into tiles: what their bundles say, and what is refused."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import save_file

from engines.bundle import BundleDraft
from engines.errors import OptionError
from engines.picture_tiles import NEWLINE, Newlines, PictureTiles
from export.checkpoint.llava import Checkpoint
from export.checkpoint.schema import ASPECT_RATIO

_FILE = "vision/image_newline.safetensors"


def tiles_of(checkpoint: Checkpoint, newlines: Newlines) -> PictureTiles | None:
    """Return how a checkpoint's pictures are cut; None where a picture is one square."""
    if checkpoint.resolutions is None:
        return None
    return PictureTiles(
        side=checkpoint.image_size,
        resolutions=checkpoint.resolutions,
        newline=_FILE,
        newlines=newlines,
        most_tiles=_most_tiles(checkpoint),
    )


def _most_tiles(checkpoint: Checkpoint) -> int | None:
    """Return how many tiles' worth of tokens there are at most; None: no limit."""
    if not checkpoint.kind.scales_down:
        return None
    return int(checkpoint.config.vision_aspect_ratio.removeprefix(ASPECT_RATIO))


def write_newline(checkpoint: Checkpoint, tiles: PictureTiles, draft: BundleDraft) -> None:
    """Write the vector that ends a row."""
    newline = np.ascontiguousarray(checkpoint.image_newline().numpy())  # [D]
    save_file({NEWLINE: newline}, draft.path(tiles.newline))


def refuse_with_tiles(checkpoint: Checkpoint, frames: bool) -> None:
    """Refuse what is not built for a checkpoint whose pictures are cut into tiles.

    Args:
        checkpoint: opened.
        frames: whether the graph is to take camera frames.

    Raises:
        OptionError: frames.
    """
    if checkpoint.resolutions is not None and frames:
        raise OptionError(
            f"--input uint8: {checkpoint.name} cuts a picture into tiles by its proportions, and "
            "the CPU does that. Leave --input and --frame out."
        )
