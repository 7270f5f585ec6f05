"""Polygraphy's `--data-loader-script`: the pictures as the vision graph takes them.

The pictures are in `inputs.npz` beside this file. Needs NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def load_data() -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Yield what Polygraphy feeds the graph, a batch of one picture at a time."""
    with np.load(Path(__file__).with_name("inputs.npz"), allow_pickle=False) as inputs:
        for name in inputs.files:
            batch = inputs[name]  # [pictures, 3, H, W]
            for at in range(len(batch)):
                yield {name: batch[at : at + 1]}
