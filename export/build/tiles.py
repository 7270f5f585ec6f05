"""Checkpoints whose pictures are cut into tiles: what their bundles say, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from safetensors.numpy import save_file

from engines.bundle import BundleDraft
from engines.errors import CheckpointError, OptionError
from engines.manifest import Prompt
from engines.picture_tiles import NEWLINE, ClipFrames, Newlines, PictureTiles
from export.checkpoint.llava import Checkpoint
from export.checkpoint.schema import ASPECT_RATIO
from export.checkpoint.video_processor import read_clips
from export.reducers import REDUCERS, Reducer

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
        clips=_clips_of(checkpoint),
        several="squares" if checkpoint.kind.clips else "tiles",
    )


def _clips_of(checkpoint: Checkpoint) -> ClipFrames | None:
    """Return how a checkpoint's clips are seen; None where they are not: see `notes_of_clips`."""
    if not checkpoint.kind.clips:
        return None
    try:
        return read_clips(checkpoint.root, checkpoint.preprocessing)
    except CheckpointError:
        return None


def notes_of_clips(checkpoint: Checkpoint, prompt: Prompt) -> tuple[str, ...]:
    """Say why a bundle takes no clips, if its checkpoint is of a kind that does."""
    if not checkpoint.kind.clips:
        return ()
    if prompt.video_token is None:
        return ("clips are refused: the chat template has no place for one.",)
    try:
        read_clips(checkpoint.root, checkpoint.preprocessing)
    except CheckpointError as error:
        return (f"clips are refused: {error}",)
    return ()


def _most_tiles(checkpoint: Checkpoint) -> int | None:
    """Return how many tiles' worth of tokens there are at most; None: no limit."""
    if not checkpoint.kind.scales_down:
        return None
    return int(checkpoint.config.vision_aspect_ratio.removeprefix(ASPECT_RATIO))


def tiles_with_shared_budget(
    tiles: PictureTiles | None, total: int, reducers: Sequence[Reducer], checkpoint: Checkpoint
) -> PictureTiles:
    """Return how pictures are cut where their squares share a budget.

    Args:
        tiles: from `tiles_of`.
        total: of a picture.
        reducers: one for each budget of a square.
        checkpoint: opened.

    Raises:
        OptionError: there are no squares, the reducer does not say what a token is worth, there
            are several budgets, or the total is not between what one square and all leave.
    """
    asked = f"--picture-tokens {total}"
    if tiles is None:
        raise OptionError(
            f"{asked}: a picture is one square for {checkpoint.name}, so there is nothing to "
            f"share. Use --tokens {total}."
        )
    told = ", ".join(dict.fromkeys(one.name for one in reducers if not one.weighs))
    if told:
        able = ", ".join(sorted(name for name, kind in REDUCERS.items() if kind.weighs))
        raise OptionError(
            f"{asked}: reducer {told} does not say what a token is worth, so squares cannot share "
            f"a budget by content. Use --reducer with one of {able}; or leave it out, and each of "
            f"up to {tiles.most_squares} squares leaves --tokens."
        )
    patches = checkpoint.patch_side**2
    counts = [one.token_count(patches) for one in reducers]
    if len(counts) > 1:
        raise OptionError(
            f"{asked} with --tokens {','.join(map(str, counts))}: one budget is shared, and one "
            "number is the most that a square leaves. Give one, and build a bundle for each."
        )
    most = tiles.most_squares * counts[0]
    if not counts[0] <= total <= most:
        raise OptionError(
            f"{asked} with --tokens {counts[0]}: {tiles.most_squares} squares leave {most} tokens "
            f"at most. Ask for {counts[0]} to {most} for the picture, or change --tokens."
        )
    return tiles.model_copy(update={"picture_tokens": total})


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
