"""The parts of what a model takes: a name, bytes, where they lie and how the number was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Place = Literal["host", "gpu"]
Basis = Literal["counted", "plan", "estimate"]
"""``counted`` from shapes and files, told by the ``plan``, or an ``estimate`` by a formula."""


@dataclass(frozen=True)
class MemoryPart:
    """One thing that takes memory.

    Attributes:
        name: what it is.
        bytes: how much.
        place: whose memory; a Jetson has one for both.
        basis: how the number was found.
    """

    name: str
    bytes: int
    place: Place = "host"
    basis: Basis = "counted"


@dataclass(frozen=True)
class MemoryNeed:
    """All that a model takes while it answers."""

    parts: tuple[MemoryPart, ...]

    @property
    def total_bytes(self) -> int:
        """Of host and GPU together, which is what counts where they share one memory."""
        return sum(part.bytes for part in self.parts)

    def bytes_on(self, place: Place) -> int:
        """Return what lies in the memory of the host, or of the GPU."""
        return sum(part.bytes for part in self.parts if part.place == place)

    def with_parts(self, more: Sequence[MemoryPart]) -> MemoryNeed:
        """Return the need with more parts."""
        return MemoryNeed((*self.parts, *more))
