"""Options of clips: what counts as a clip and how much of it is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from engines.picture_tiles import MOST_CLIP_FRAMES

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".y4m"}
)


USUAL_FRAMES = 8


@dataclass(frozen=True)
class ClipOptions:
    """How a clip is looked at; the help of each option says what it means."""

    clip_frames: Annotated[
        int | None,
        typer.Option(
            "--clip-frames",
            min=1,
            max=MOST_CLIP_FRAMES,
            help="Frames of a clip to look at, spread over it; left out, as many as the "
            f"checkpoint says it expects, or {USUAL_FRAMES}.",
        ),
    ] = None
    clip_tokens: Annotated[
        int | None,
        typer.Option(
            "--clip-tokens",
            min=1,
            help="Visual tokens a clip may cost, shared among its frames by how much is new in "
            "each; left out, as many as one picture has patches, or, of a checkpoint trained on "
            "clips, as all frames cost pooled. The newline at a clip's end is not counted.",
        ),
    ] = None
    topic: Annotated[str | None, typer.Option(help="Topic of a bag, by name or message type.")] = (
        None
    )


def is_clip(path: str | Path) -> bool:
    """Say whether a path is a video, a bag or a folder of pictures rather than one picture."""
    from runtime.frames.bag import is_bag

    file = Path(path)
    try:
        return file.suffix.lower() in VIDEO_SUFFIXES or file.is_dir() or is_bag(file)
    except OSError:  # a name that no file can have; opening it as a picture says so
        return False
