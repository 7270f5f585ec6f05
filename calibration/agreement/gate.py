"""When two vision graphs are alike enough.

Enters: an average `Agreement`. Leaves: a verdict, or by how much it is missed.
"""

from __future__ import annotations

from dataclasses import dataclass

from calibration.agreement.token_metrics import Agreement


@dataclass(frozen=True)
class Gate:
    """The least agreement that is good enough."""

    overlap: float = 0.97
    cosine: float = 0.99

    def holds(self, agreement: Agreement) -> bool:
        """Return whether both measures are reached."""
        return agreement.overlap >= self.overlap and agreement.cosine >= self.cosine

    def cost(self, agreement: Agreement) -> float:
        """Return the error as a multiple of what the gate allows, both measures added up."""
        allowed = max(1 - self.overlap, 1e-6), max(1 - self.cosine, 1e-6)
        return (1 - agreement.overlap) / allowed[0] + (1 - agreement.cosine) / allowed[1]
