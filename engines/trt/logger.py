"""Keep what TensorRT says went wrong, for the error that is raised.

TensorRT's own logger prints on stdout, which belongs to a command's results. TensorRT keeps one
pointer to a logger for the whole process, so there is one logger that lives as long.
"""

from __future__ import annotations

import functools
from typing import Any

_MOST_KEPT = 16


@functools.cache
def process_logger(trt: Any) -> Any:
    """Return the process's `ILogger`, with a method ``take() -> str``; the same at every call.

    The class is made here because its base belongs to whichever library was loaded.
    """
    severity = trt.ILogger.Severity
    errors = (severity.INTERNAL_ERROR, severity.ERROR)

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.heard: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in errors and len(self.heard) < _MOST_KEPT:
                self.heard.append(" ".join(msg.split()))

        def take(self) -> str:
            """Return the first error since it was last asked, which caused the others."""
            first = self.heard[0].rstrip(".") if self.heard else "it does not say why"
            self.heard.clear()
            return first

    return ErrorLog()
