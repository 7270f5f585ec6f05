"""Report the progress of a TensorRT build through one callback, and stop the build on Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ProgressCallback = Callable[[str, float], None]
"""Called with the phase and how much of it is done, 0 to 1."""


def make_progress_monitor(trt: Any, callback: ProgressCallback | None) -> Any:
    """Return a monitor with an attribute ``interrupted``.

    The class is made here because its base belongs to whichever library was loaded.
    """

    class BuildMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = max(1, num_steps)
            self._report(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._report(phase_name, self.steps.pop(phase_name, 1))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return not self.interrupted

        def _report(self, phase: str, done: int) -> None:
            try:
                if callback is not None:
                    callback(phase, min(1.0, done / self.steps.get(phase, max(1, done))))
            except KeyboardInterrupt:  # may not cross into the library
                self.interrupted = True

    return BuildMonitor()
