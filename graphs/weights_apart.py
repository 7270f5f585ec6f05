"""Keep the weights of a graph in a file of their own, which variants of the graph share.

A graph that is opened from there maps its weights from the disk, so that it costs no memory, and a
variant that is written beside it costs only what it changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir


@contextmanager
def weights_apart(source: Path) -> Iterator[Path]:
    """Yield a copy of a graph in a temporary folder, its weights in a file beside it.

    Args:
        source: the graph, with its weights inside or beside it.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder) / "graph.onnx"
        ir.save(ir.load(source), file, external_data="graph.data")
        yield file
