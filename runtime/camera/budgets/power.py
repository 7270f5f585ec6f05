"""Read how much power a Jetson draws from NVIDIA's `tegrastats`.

It reads the lines of Orin (JetPack 6, 7) and Thor (JetPack 7). It is tested against lines that
people recorded on such boards, and has never run on one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from engines.errors import OptionError

_INTERVAL_MS = 200
_FIRST_READING_S = 5.0

_RAIL = re.compile(r"\b(V[A-Z0-9_]+) (-?\d+)mW\b")
"""A rail and its power at the moment; what follows a slash is the mean, since JetPack 7 the peak
too. An idle rail can read a little below 0."""
_TOTALS = ("VIN", "VDD_IN")
"""Rails that everything is behind: Thor's, and that of Orin Nano and NX."""
_PARTS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
"""AGX Orin has no such rail; these three together are its module (VDDQ is a part of VIN_SYS)."""


class PowerMeter(Protocol):
    """Says how much power the machine draws."""

    def take_watts(self) -> float | None:
        """Return the mean since it was last asked; None when nothing was read since."""


def watts_from_line(line: str) -> float | None:
    """Return what a line of `tegrastats` says the module draws; None when it does not say."""
    rails = {name: int(milliwatts) for name, milliwatts in _RAIL.findall(line)}
    for total in _TOTALS:
        if total in rails:
            return rails[total] / 1e3
    if all(part in rails for part in _PARTS):
        return sum(rails[part] for part in _PARTS) / 1e3
    return None


class Tegrastats(AbstractContextManager["Tegrastats"]):
    """Runs `tegrastats` and keeps what it says; safe to use from several threads."""

    def __init__(self, command: Iterable[str] = ("tegrastats", "--interval", str(_INTERVAL_MS))):
        """Start it and wait for its first reading.

        Raises:
            OptionError: it is not there, or its lines do not say what is drawn.
        """
        program, *arguments = command
        found = shutil.which(program)
        if found is None:
            raise OptionError(
                f"A power target needs {program}, which is on every Jetson and not on this "
                "machine's path. Give --latency-target or --tokens-per-second instead."
            )
        self._lock = threading.Lock()
        self._sum_watts, self._count = 0.0, 0
        self._line = ""
        self._read = threading.Event()
        self._process = subprocess.Popen(
            [found, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._thread = threading.Thread(target=self._follow, name="tegrastats", daemon=True)
        self._thread.start()
        self._read.wait(_FIRST_READING_S)
        if not self._count:
            self.close()
            said = f"Its last line: {self._line!r}. " if self._line else "It said nothing. "
            raise OptionError(
                f"{found} does not say what the module draws. {said}Some releases tell it to root "
                "only: try with sudo."
            )

    def take_watts(self) -> float | None:
        """Return the mean since it was last asked; None when nothing was read since."""
        with self._lock:
            if not self._count:
                return None
            watts = self._sum_watts / self._count
            self._sum_watts, self._count = 0.0, 0
            return watts

    def _follow(self) -> None:
        for line in self._process.stdout or ():
            self._line = line.strip() or self._line
            watts = watts_from_line(line)
            if watts is None:
                continue
            with self._lock:
                self._sum_watts += watts
                self._count += 1
            self._read.set()
        self._read.set()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; calling it again does nothing."""
        self._process.kill()
        self._process.wait()
        self._thread.join(timeout=1.0)
