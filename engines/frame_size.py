"""Size of the camera frames that a vision graph takes, where it takes frames instead of pixels."""

from __future__ import annotations

from dataclasses import dataclass

from engines.errors import BundleError, OptionError
from engines.manifest import Graph

FRAMES_INPUT = "frames"
"""Input of a graph that resizes and normalises by itself, uint8[B, H, W, 3] in RGB."""

_MOST_PIXELS = 8192
"""Along a side."""


@dataclass(frozen=True)
class FrameSize:
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def frame_size_from_text(text: str) -> FrameSize:
    """Read ``"1080x1920"``, height and width.

    Raises:
        OptionError: not two sizes that a frame can have.
    """
    sides = text.split("x")
    if len(sides) == 2 and all(side.isascii() and side.isdecimal() for side in sides):
        height, width = map(int, sides)
        if 0 < height <= _MOST_PIXELS and 0 < width <= _MOST_PIXELS:
            return FrameSize(height, width)
    raise OptionError(
        f"--frame {text}: expected height and width of the camera's frames in pixels, 1 to "
        f"{_MOST_PIXELS} each, such as 1080x1920."
    )


def frame_size_of(graph: Graph) -> FrameSize | None:
    """Return the frames that a graph takes; None where it takes `pixel_values`.

    Raises:
        BundleError: its input is called `frames` and is none.
    """
    first = graph.inputs[0]
    if first.name != FRAMES_INPUT:
        return None
    match first.shape:
        case (_, int(height), int(width), 3) if first.dtype == "uint8":
            return FrameSize(height, width)
    raise BundleError(
        f"bundle.json: the input {FRAMES_INPUT} of {graph.file} is {first.dtype}"
        f"[{', '.join(map(str, first.shape))}], expected uint8[batch, height, width, 3]. Build "
        "the bundle again with `python -m export.build`."
    )
