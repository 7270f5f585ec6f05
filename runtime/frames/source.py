"""A source of frames: one reader with a rotation, a crop and a frame rate.

What cannot be read is counted in `FrameSource.errors` and skipped, so one bad packet does not end
the source. An unexpected exception of a decoder or a driver becomes such a count here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer

from engines.errors import OptionError, PictureError, SourceError
from engines.option_groups import Typed
from runtime.frames.frame import Capture, Frame, Reader, ReadErrors, Recorded

if TYPE_CHECKING:
    from runtime.vision import Pixels

Rotation = Literal[0, 90, 180, 270]

_EARLY = 0.1
"""A frame may come this share of a period early; cameras do not keep time exactly."""


def crop_from_text(text: str) -> tuple[int, int, int, int]:
    """Read ``x,y,width,height``.

    Raises:
        OptionError: it is not four whole numbers.
    """
    pieces = [piece.strip() for piece in text.split(",")]
    if len(pieces) != 4 or not all(piece.isdecimal() for piece in pieces):
        raise OptionError(f"The crop is {text!r}, expected x,y,width,height as in 100,0,800,600.")
    x, y, width, height = map(int, pieces)
    return x, y, width, height


@dataclass(frozen=True)
class FrameShape:
    """How each frame is cut and turned.

    Attributes:
        rotate: degrees clockwise, applied after the crop.
        crop: x, y, width and height in pixels of the source's own frames; None for all of it.
    """

    rotate: Annotated[Rotation, typer.Option(help="Degrees clockwise: 0, 90, 180 or 270.")] = 0
    crop: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(help="Part of the frame to look at: x,y,width,height in pixels."),
        Typed(crop_from_text),
    ] = None

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise OptionError(" ".join(problems))

    def problems(self) -> list[str]:
        """Return what cannot be served, a sentence each."""
        problems = []
        if self.rotate not in (0, 90, 180, 270):
            problems.append(f"rotate is {self.rotate}, expected 0, 90, 180 or 270 degrees.")
        if self.crop is not None and (
            len(self.crop) != 4 or min(self.crop) < 0 or min(self.crop[2:]) < 1
        ):
            problems.append(
                f"crop is {self.crop}, expected x, y, width, height in pixels, for example "
                "100,0,800,600."
            )
        return problems


@dataclass(frozen=True)
class FrameView(FrameShape):
    """How frames are looked at.

    Attributes:
        fps: most frames per second; None for all of them, and of a camera to calibrate on, 1.
    """

    fps: Annotated[float | None, typer.Option(help="Most frames per second to read.")] = None

    def problems(self) -> list[str]:
        """Return what cannot be served, a sentence each."""
        wrong = self.fps is not None and not self.fps > 0
        return super().problems() + [f"fps is {self.fps}, expected more than 0."] * wrong


@dataclass(frozen=True)
class SourceOptions(FrameView):
    """How a source is looked at.

    Attributes:
        topic: name or message type of the topic of a bag that has several.
    """

    topic: Annotated[str | None, typer.Option(help="Topic of a bag, by name or message type.")] = (
        None
    )


@dataclass(frozen=True)
class UndecodedFrame:
    """A frame of a source whose picture was not decoded yet.

    Attributes:
        index: which frame of the source it is, from 0, those that `FrameView.fps` leaves out
            counted too.
        timestamp_ns: as in `Frame`.
        decode: gives the frame; None, and counted, if it cannot be decoded.
    """

    index: int
    timestamp_ns: int
    decode: Callable[[], Frame | None]


class FrameSource(AbstractContextManager["FrameSource"]):
    """Frames of one reader; iterate over it once, and use it as a context manager.

    Attributes:
        name: what the source is called.
        live: whether frames are lost when nobody takes them.
        length: about how many frames a recording has; None where it does not say.
        errors: what could not be read so far.
        failure: what a driver or a library raised to end it; None where it ended by itself.
    """

    def __init__(self, reader: Reader, options: FrameView | None = None) -> None:
        self.name = reader.name
        self.live = reader.live
        self.length = reader.length if isinstance(reader, Recorded) else None
        self.errors = ReadErrors(reader.name)
        self.failure: Exception | None = None
        self._reader = reader
        self._options = options or FrameView()
        self._clock = FrameClock(self._options.fps)

    def __iter__(self) -> Iterator[Frame]:
        return self.chosen(lambda: True)

    def chosen(self, wants_next: Callable[[], bool]) -> Iterator[Frame]:
        """Yield the frames that are wanted; pictures of the others are not decoded.

        Args:
            wants_next: asked once before each frame of the source.
        """
        for frame in self.undecoded():
            if wants_next() and (decoded := frame.decode()) is not None:
                yield decoded

    def undecoded(self) -> Iterator[UndecodedFrame]:
        """Yield each frame with a way to get its picture."""
        try:
            for index, capture in enumerate(self._reader.captures(self.errors)):
                if self._clock.wants(capture.timestamp_ns):
                    decode = partial(self._decode, capture)
                    yield UndecodedFrame(index, capture.timestamp_ns, decode)
        except Exception as error:  # whatever a driver or a library raises costs this source alone
            self.errors.count("source failed", repr(error))
            self.failure = error

    def _decode(self, capture: Capture) -> Frame | None:
        try:
            return Frame(self._view(capture.image()), capture.timestamp_ns, self.name)
        except (SourceError, PictureError) as error:
            self.errors.count("undecodable", error)
        except Exception as error:  # a decoder's; the next frame may be whole
            self.errors.count("undecodable", repr(error))
        return None

    def _view(self, image: Pixels) -> Pixels:
        if self._options.crop is not None:
            x, y, width, height = self._options.crop
            rows, columns = image.shape[:2]
            if x + width > columns or y + height > rows:
                raise SourceError(
                    f"the crop {x},{y},{width},{height} reaches outside a frame of "
                    f"{columns}x{rows} pixels. Make it smaller."
                )
            image = image[y : y + height, x : x + width]
        if self._options.rotate:
            image = np.rot90(image, k=-self._options.rotate // 90)
        return image

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop, from any thread; calling it again does nothing."""
        self._reader.close()


class FrameClock:
    """Chooses frames by their time so that at most ``fps`` of them are taken per second."""

    def __init__(self, fps: float | None) -> None:
        self._period_ns = None if fps is None else 1e9 / fps
        self._due_ns: float | None = None

    def wants(self, timestamp_ns: int) -> bool:
        """Say whether the frame of that time is to be taken."""
        if self._period_ns is None:
            return True
        due, period = self._due_ns, self._period_ns
        # A clock that was set back, or a gap, restarts the schedule.
        if due is None or not due - 2 * period < timestamp_ns < due + period:
            self._due_ns = timestamp_ns + period
            return True
        if timestamp_ns < due - _EARLY * period:
            return False
        self._due_ns = due + period
        return True
