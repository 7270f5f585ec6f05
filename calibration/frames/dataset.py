"""Make a calibration set from the user's own frames.

The set holds distinct frames spread over the whole source (anything `runtime.frames` opens), as the
vision tower sees them, with their coverage and a digest. A frame is one square or, where the
checkpoint cuts pictures into tiles, a few. They are kept as uint8, a quarter of the memory of
`pixel_values` (256 squares of 336 x 336 are 87 MB, and twice that while they are read).
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Protocol

import typer

from calibration.frames.coverage import Coverage, measure_coverage
from calibration.frames.distinct_frames import DistinctFrames
from engines.errors import OptionError, SourceError
from engines.manifest import Preprocessing
from runtime.frames import Frame, FrameSource, SourceOptions, open_source
from runtime.frames.source import FrameClock
from runtime.vision import Pixels
from runtime.vision.preprocess import PixelValues, normalise, resize_picture

MOST_UNREADABLE = 0.1
"""Share of the frames that may be unreadable before something is wrong with the source."""

_LIVE_FPS = 1.0
_TURNS = (
    "calibration",
    "search",
    "calibration",
    "calibration",
    "gate",
    "calibration",
    "report",
    "calibration",
)
"""What each of eight frames is for, so that every set is spread over the whole source."""
_SMALL = "smaller than a patch"

Cut = Callable[[Pixels], Sequence[Pixels]]
"""Makes the squares of a frame, as `Layout.squares` does."""

Progress = Callable[[int, int], None]
"""Called with how many frames were read and how many of them are kept."""


class Frames(Protocol):
    """Squares that can be gone through more than once; a list of arrays is such a thing."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[PixelValues]:
        """Yield float32[1, 3, H, W], a square as the tower takes it."""


@dataclass(frozen=True)
class FrameOptions:
    """Which frames to take.

    Attributes:
        max_frames: most frames in the set.
        view: how the source is looked at, the same as when the robot watches: rotation, crop, most
            frames per second (a live source gives one per second if left out), topic of a bag.
        live_s: seconds after which a live source has given enough.
        patch_pixels: pixels along a patch of the tower; smaller frames are unreadable.
    """

    max_frames: Annotated[
        int,
        typer.Option(
            min=8,
            help="Most frames to take, spread evenly over the source, repeats left out; of one "
            "that is cut into tiles, the view of all of it and a few tiles.",
        ),
    ] = 256
    view: SourceOptions = field(default_factory=SourceOptions)
    live_s: Annotated[
        float,
        typer.Option("--seconds", min=1.0, help="Of a camera: how long to collect at most."),
    ] = 600.0
    patch_pixels: int = 14

    def __post_init__(self) -> None:
        if self.max_frames < 2 or not self.live_s > 0:
            raise OptionError(
                f"max_frames is {self.max_frames} and live_s {self.live_s:g}, expected at least 2 "
                "frames and more than 0 seconds."
            )


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Frames to calibrate with; iterate over their squares as often as you like.

    Attributes:
        frames: the squares of each, uint8[height, width, 3]: one, or the view of the whole frame
            and some of its tiles.
        preprocessing: how they become `pixel_values`.
        source: where they are from.
        coverage: what they cover; of the whole set, also for a part of it.
    """

    frames: tuple[tuple[Pixels, ...], ...]
    preprocessing: Preprocessing
    source: str
    coverage: Coverage

    @cached_property
    def pictures(self) -> tuple[Pixels, ...]:
        """The squares of all frames, in order."""
        return tuple(square for squares in self.frames for square in squares)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many squares of each frame there are."""
        return tuple(map(len, self.frames))

    def describe(self) -> str:
        """Return how many there are, in words."""
        if len(self) == len(self.frames):
            return f"{len(self)} frames"
        return f"{len(self)} squares of {len(self.frames)} frames"

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[PixelValues]:
        """Yield `pixel_values`, float32[1, 3, height, width], made one at a time."""
        for picture in self.pictures:
            yield normalise(picture, self.preprocessing)[None]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the pictures in their order, as hexadecimal digits."""
        digest = hashlib.sha256()
        for picture in self.pictures:
            digest.update(repr(picture.shape).encode())
            digest.update(picture.tobytes())
        return digest.hexdigest()

    def split(self) -> FrameSets:
        """Split it into sets that share no frame; always the same frames into the same set.

        Raises:
            SourceError: there are too few frames for that.
        """
        count = len(self.frames)
        if count < len(_TURNS):
            raise SourceError(
                f"{self.source} has {count} distinct frames, expected {len(_TURNS)} at the "
                "least, to calibrate, search, judge and report on different ones, and better 128: "
                f"{len(_TURNS) - count} more are needed. Give a longer recording, or a folder "
                "with more pictures."
            )
        turns = [_TURNS[at % len(_TURNS)] for at in range(count)]
        parts = {
            name: tuple(f for f, turn in zip(self.frames, turns, strict=True) if turn == name)
            for name in sorted(set(_TURNS))
        }
        return FrameSets(**{name: replace(self, frames=part) for name, part in parts.items()})


@dataclass(frozen=True)
class FrameSets:
    """Frames apart by what they are for.

    Attributes:
        calibration: five of eight; the scales are found on them.
        search: one of eight; `--precision mixed` searches on them.
        gate: one of eight; the result passes on them or is refused.
        report: one of eight; nothing is decided on them, so that their numbers flatter nobody.
    """

    calibration: CalibrationSet
    search: CalibrationSet
    gate: CalibrationSet
    report: CalibrationSet


def collect_frames(
    source: str | FrameSource,
    preprocessing: Preprocessing,
    options: FrameOptions | None = None,
    progress: Progress = lambda read, kept: None,
    cut: Cut | None = None,
) -> CalibrationSet:
    """Read a source and keep distinct frames from the whole of it.

    Args:
        source: what `runtime.frames.open_source` opens, or an open source, which is closed.
        preprocessing: the bundle's, or the checkpoint's.
        options: which frames to take; `options.view` does not apply to an open source.
        progress: called after each frame.
        cut: makes the squares of a frame; None where it is one.

    Raises:
        SourceError: the source cannot be opened, more than a tenth of its frames are unreadable,
            or fewer than two are different.
        OptionError: an option has no meaning for this source.
    """
    options = options or FrameOptions()
    cut = cut or (lambda picture: [resize_picture(picture, preprocessing)])
    if isinstance(source, str):
        source = open_source(source, options.view)
    sample = DistinctFrames(options.max_frames)
    with ExitStack() as open_things:
        frames = open_things.enter_context(source)
        for frame in _frames_of(frames, sample, options, open_things):
            height, width = frame.image.shape[:2]
            if min(height, width) < options.patch_pixels:
                size = f"{width}x{height} pixels, and a patch alone is {options.patch_pixels}"
                frames.errors.count(_SMALL, f"a frame has {size}")
                continue
            sample.look_at(cut(frame.image))
            progress(sample.read, len(sample))
            if frames.live and len(sample) == options.max_frames:
                break
    _refuse_unreadable(frames, sample)
    kept = sample.items()
    if len(kept) < 2:
        raise SourceError(
            f"{frames.name} has {len(kept)} distinct frames ({sample.read} read, "
            f"{sample.repeated} of them the same picture as another), expected 2 at the very least "
            "and better 128 or more. Give a longer recording, or a folder with more pictures."
        )
    return CalibrationSet(
        frames=tuple(frame.squares for frame in kept),
        preprocessing=preprocessing,
        source=frames.name,
        coverage=measure_coverage(
            sample, [frame.signature for frame in kept], frames.errors.counts
        ),
    )


def _frames_of(
    frames: FrameSource, sample: DistinctFrames, options: FrameOptions, open_things: ExitStack
) -> Iterator[Frame]:
    """Return the frames to look at: of a recording spread over all of it, of a camera for a time.

    A live source that is asked at no particular rate would give a second's worth of nearly equal
    frames; it is asked once per second, and closed when its time is over even if it hangs.
    """
    if not frames.live:
        return frames.chosen(sample.wants_next)
    clock = FrameClock(options.view.fps or _LIVE_FPS)
    timer = threading.Timer(options.live_s, frames.close)
    timer.daemon = True
    timer.start()
    open_things.callback(timer.cancel)
    return frames.chosen(lambda: clock.wants(time.monotonic_ns()) and sample.wants_next())


def _refuse_unreadable(frames: FrameSource, sample: DistinctFrames) -> None:
    """Count pictures against those that were tried, and damage of the stream against all of it."""
    counts = frames.errors.counts
    pictures = counts["undecodable"] + counts[_SMALL]
    stream = counts.total() - pictures
    share = pictures / max(sample.read + pictures, 1) + stream / max(sample.seen + stream, 1)
    if share <= MOST_UNREADABLE:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    raise SourceError(
        f"{frames.name}: {share:.0%} of its frames cannot be used ({reasons}; {sample.read} were "
        f"read), expected at most {MOST_UNREADABLE:.0%}. The last one: {frames.errors.last}. "
        "Repair the recording, or give another."
    )
