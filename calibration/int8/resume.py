"""The folder beside a bundle that an interrupted calibration continues from.

It is removed once there is a result, either a bundle or a missed gate.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engines.errors import GateError


@dataclass(frozen=True)
class ResumeFolder:
    """The folder of a calibration that is not finished.

    Attributes:
        out: directory of the bundle.
    """

    out: Path

    @property
    def folder(self) -> Path:
        """Where everything is."""
        return self.out.with_name(f"{self.out.name}.calibrating")

    @property
    def sums(self) -> Path:
        """What was gathered of the frames; see `calibration.scales.resume`."""
        return self.folder / "sums.safetensors"

    @property
    def trials(self) -> Path:
        """What the search for layers to leave in floating point measured."""
        return self.folder / "trials.json"

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Remove it when the block ends with a result; an error or Ctrl-C leaves it."""
        try:
            yield
        except GateError:
            self._remove()
            raise
        self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
