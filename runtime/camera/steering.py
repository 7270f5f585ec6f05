"""Control a running loop by commands, one per line, and by the signals that end a process.

A line that is not a command, whatever bytes it holds, is reported on stderr and changes nothing.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO

from engines.errors import FoveateError, OptionError

if TYPE_CHECKING:
    from runtime.camera.loop import CameraLoop

_LONGEST_LINE_BYTES = 65_536
_NOT_UTF_8 = "\N{REPLACEMENT CHARACTER}"


def lines_of(stream: BinaryIO) -> Iterator[str]:
    """Yield the lines of a stream; what is not UTF-8 becomes U+FFFD, endless lines are left out."""
    while line := stream.readline(_LONGEST_LINE_BYTES):
        if len(line) == _LONGEST_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(_LONGEST_LINE_BYTES)) and not rest.endswith(b"\n"):
                continue
            print(f"control: a line is longer than {_LONGEST_LINE_BYTES} bytes", file=sys.stderr)
            continue
        yield line.decode("utf-8", "replace")


def obey(control: Iterable[str], loop: CameraLoop) -> None:
    """Carry out what is written on the control lines, until they end."""
    for line in control:
        try:
            word, _, rest = line.strip().partition(" ")
            if _NOT_UTF_8 in line:
                raise OptionError(f"{line.strip()!r:.300} is not UTF-8, expected a command.")
            if word == "ask":
                loop.ask(rest)
            elif word in ("pause", "resume", "stop") and not rest:
                getattr(loop, word)()
            elif word:
                raise OptionError(
                    f"{line.strip()!r:.300} is not a command, expected ask QUESTION, pause, resume "
                    "or stop."
                )
        except Exception as error:  # a command costs itself: the next must be heard
            told = error if isinstance(error, FoveateError) else repr(error)
            print(f"control: {told}", file=sys.stderr)


@contextmanager
def stopping_on_signals(loop: CameraLoop) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the loop in order; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for each in held:
            signal.signal(each, signal.SIG_DFL)
        loop.stop()

    held = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in held.items():
            signal.signal(each, handler)
