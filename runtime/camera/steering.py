"""Control a running loop by commands, one per line, and by the signals that end a process."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from engines.errors import FoveateError, OptionError

if TYPE_CHECKING:
    from runtime.camera.loop import CameraLoop


def obey(control: Iterable[str], loop: CameraLoop) -> None:
    """Carry out what is written on the control lines, until they end."""
    for line in control:
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "ask":
                loop.ask(rest)
            elif word in ("pause", "resume", "stop") and not rest:
                getattr(loop, word)()
            elif word:
                raise OptionError(
                    f"{line.strip()!r} is not a command, expected ask QUESTION, pause, resume or "
                    "stop."
                )
        except FoveateError as error:
            print(f"control: {error}", file=sys.stderr)


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
