"""Options of clips: what counts as a clip and how much of it is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".y4m"}
)


@dataclass(frozen=True)
class ClipOptions:
    """How a clip is looked at; the help of each option says what it means."""

    clip_frames: Annotated[
        int,
        typer.Option(
            "--clip-frames", min=1, max=64, help="Frames of a clip to look at, spread over it."
        ),
    ] = 8
    clip_tokens: Annotated[
        int | None,
        typer.Option(
            "--clip-tokens",
            min=1,
            help="Visual tokens a clip may cost, shared among its frames by how much is new in "
            "each; left out, as many as one picture has patches.",
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
