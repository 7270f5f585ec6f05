"""The frame that every source gives, and the reader that a kind of source implements.

A `Reader` yields `Capture`s: a time and a way to get the picture. Decoding and colour conversion
happen only for captures that are wanted, so a source read at 2 frames per second does not pay for
30.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from runtime.vision import Pixels

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a source.

    Attributes:
        image: uint8[H, W, 3], RGB.
        timestamp_ns: nanoseconds; since 1970 for cameras and bags, since the start for videos and
            folders.
        source: the name of the source it came from.
    """

    image: Pixels
    timestamp_ns: int
    source: str


@dataclass(frozen=True)
class Capture:
    """A picture that was not decoded yet.

    Attributes:
        timestamp_ns: as in `Frame`.
        image: decodes the picture to uint8[H, W, 3] RGB; raises `SourceError` or `PictureError`
            when it cannot be.
    """

    timestamp_ns: int
    image: Callable[[], Pixels]


@dataclass
class ReadErrors:
    """Reading errors of one source: counted by reason, and the first of each reason logged.

    Attributes:
        counts: reason -> how often.
        last: the message of the latest one.
    """

    source: str
    counts: Counter[str] = field(default_factory=Counter)
    last: str = ""

    def count(self, reason: str, error: object) -> None:
        """Count one error."""
        self.counts[reason] += 1
        self.last = f"{self.source}: {error}"
        if self.counts[reason] == 1:
            _log.warning("%s (%s; more of these are counted, not told)", self.last, reason)


class Reader(Protocol):
    """One kind of source.

    Attributes:
        name: what it is called in answers and errors.
        live: whether frames come at their own pace and are lost when nobody takes them.
    """

    name: str
    live: bool

    def captures(self, errors: ReadErrors) -> Iterator[Capture]:
        """Yield what is seen until the source ends or is closed; errors are counted, not raised."""

    def close(self) -> None:
        """Stop, from any thread, and free the device; calling it again does nothing."""


@runtime_checkable
class Recorded(Protocol):
    """A reader that can say how much there is.

    Attributes:
        length: about how many frames; None where the recording does not say.
    """

    length: int | None
