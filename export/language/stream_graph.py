"""Write a graph and its weights to disk, one tensor after the other.

A few tensors are computed ahead, one on each core; memory holds those alone.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir

from export.language.block_weights import Array, Piece, bytes_of

_MOST_WORKERS = 4
_ALIGNED_FROM_BYTES = 1 << 20
_PAGE_BYTES = 4096


def write_graph_and_weights(
    model: ir.Model,
    pieces: Sequence[Piece],
    file: Path,
    progress: Callable[[int, int], None],
) -> None:
    """Write the graph, its weights in one file beside it.

    Args:
        model: its initializers point into the file afterwards.
        pieces: all of its initializers.
        file: the graph; the weights get `.data` after its name.
        progress: called with the bytes written and the bytes there are.
    """
    data = file.with_name(f"{file.name}.data")
    total = sum(piece.nbytes for piece in pieces)
    written = 0
    with data.open("wb") as stream:
        for piece, arrays in _computed(pieces):
            for value, array in zip(piece.values, arrays, strict=True):
                length = bytes_of(value)
                if array.nbytes != length:
                    raise RuntimeError(f"{value.name} has {array.nbytes} bytes, expected {length}")
                offset = stream.tell()
                if length > _ALIGNED_FROM_BYTES:  # so that it can be mapped into memory as it is
                    offset = stream.seek(-(-offset // _PAGE_BYTES) * _PAGE_BYTES)
                stream.write(array.data)
                _point_to(value, data.name, file.parent, offset, length)
            written += piece.nbytes
            progress(written, total)
    model.graph.sort()
    ir.save(model, file)


def _point_to(value: ir.Value, name: str, folder: Path, offset: int, length: int) -> None:
    tensor = value.const_value
    if tensor is None:
        raise TypeError(f"{value.name} is not an initializer")
    value.const_value = ir.ExternalTensor(
        name,
        offset,
        length,
        tensor.dtype,
        shape=tensor.shape,  # type: ignore[arg-type]
        name=str(value.name),
        base_dir=folder,
    )


def _computed(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Sequence[Array]]]:
    """Yield each piece with its arrays, in order, a few being computed ahead."""
    workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
    ahead: deque[tuple[Piece, Future[Sequence[Array]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for piece in pieces:
                ahead.append((piece, pool.submit(piece.compute)))
                if len(ahead) > workers:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
