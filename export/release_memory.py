"""Return memory that this process does not need any more to the system.

Python and the C library keep freed memory for later use. It is better returned before a second
process starts that needs memory of its own.
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
