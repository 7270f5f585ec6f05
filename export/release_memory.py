"""What this process does not need any more goes back to the system.

Python and the C library keep freed memory for later use; before a second process starts that needs
memory of its own, it is better returned.
"""

from __future__ import annotations

import ctypes
import gc


def release_memory() -> None:
    """Collect what nobody refers to and return free pages to the system, where glibc can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
