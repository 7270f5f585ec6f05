"""What the doctor says of one thing that it looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    about: str
    status: Status
    found: str
    fix: str = ""
    """A command or a sentence; empty where nothing is to be done."""
