"""Play recordings at the speed they were recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator

from runtime.frames import Frame, FrameSource

_LONGEST_WAIT_S = 10.0


def at_their_own_pace(source: FrameSource) -> Iterator[Frame]:
    """Yield the frames of a recording when their time has come; a live source as it is.

    A gap or a step back in the recorded times starts the schedule anew.
    """
    start_s = first_ns = None
    for frame in source:
        if source.live:
            yield frame
            continue
        now_s = time.monotonic()
        if start_s is not None and first_ns is not None:
            wait_s = start_s + (frame.timestamp_ns - first_ns) / 1e9 - now_s
            if 0 <= wait_s <= _LONGEST_WAIT_S:
                time.sleep(wait_s)
                yield frame
                continue
            if -_LONGEST_WAIT_S < wait_s < 0:  # late: a slow disk, a busy machine
                yield frame
                continue
        start_s, first_ns = now_s, frame.timestamp_ns
        yield frame
