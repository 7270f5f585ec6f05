"""Say how many hostile inputs a test tries: all in `make test-faults`, a share in `make test`."""

from __future__ import annotations

import os

FULL = os.environ.get("FOVEATE_FAULTS") == "full"
"""Whether every input is tried."""
_SHARE = 20
"""In `make test`, one input in so many is tried."""


def cases(count: int) -> int:
    """Return how many of `count` inputs to try now; at least one."""
    return count if FULL else max(1, count // _SHARE)
