"""What a frozen tower makes of a store, computed once and kept in a file.

A function that sees a part of the store enters; features that are read from disk leave.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor


def cache_features(
    path: Path, count: int, shape: tuple[int, ...], see: Callable[[slice], Tensor], batch: int = 20
) -> Tensor:
    """Return bfloat16[count, *shape] kept in a file, which is continued if it was interrupted.

    Args:
        path: the file; one beside it counts the rows that are done.
        count: rows.
        shape: of a row.
        see: returns bfloat16 rows of a part.
        batch: rows of a part.
    """
    counter = path.with_suffix(".count")
    mode: Literal["r+", "w+"] = "r+" if path.exists() else "w+"
    kept = np.memmap(path, np.int16, mode, shape=(count, *shape))
    done = int(counter.read_text()) if mode == "r+" and counter.exists() else 0
    for start in range(done, count, batch):
        part = slice(start, min(start + batch, count))
        kept[part] = see(part).view(torch.int16).numpy()
        counter.write_text(str(part.stop))
    return torch.from_numpy(kept).view(torch.bfloat16)
