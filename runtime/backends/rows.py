"""Parts of a prompt, checked and joined into the rows that a language model takes.

Enters: runs of token ids and of visual tokens. Leaves: float32[N, D]. Every backend checks here, so
nothing that could poison a KV cache (a NaN, a row of another width) reaches any of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.errors import BackendError
from runtime.language.embeddings import EmbeddingTable
from runtime.language.parts import Embeddings, Part


def rows_from_parts(parts: Sequence[Part], table: EmbeddingTable) -> Embeddings:
    """Return all parts as embedding rows, float32[N, D], in order.

    Raises:
        BackendError: no row at all, a shape or dtype that is no part, the wrong hidden size, or
            numbers that are not finite.
    """
    rows = [_rows_from_part(index, part, table) for index, part in enumerate(parts)]
    joined = np.concatenate(rows) if rows else np.zeros((0, table.hidden_size), np.float32)
    if not len(joined):
        raise BackendError(
            "The language model was given an empty prompt: expected at least one token or "
            "embedding. Pass a question."
        )
    return joined  # [N, D]


def require_room(position: int, count: int, context_length: int) -> None:
    """Check that ``count`` more positions fit.

    Raises:
        BackendError: they do not.
    """
    if position + count > context_length:
        raise BackendError(
            f"{count} more positions after {position} make {position + count}, and the context "
            f"holds {context_length}. Ask a shorter question, drop earlier turns, use a bundle "
            "with fewer visual tokens, or open the backend with a larger context "
            "(--context-length) if the model allows it."
        )


def require_rewind(position: int, filled: int) -> None:
    """Check that a rewind goes backwards.

    Raises:
        BackendError: ``position`` is negative or was never filled.
    """
    if not 0 <= position <= filled:
        raise BackendError(
            f"Cannot rewind to position {position}: expected 0 to {filled}, the positions filled "
            "so far."
        )


def _rows_from_part(index: int, part: Part, table: EmbeddingTable) -> Embeddings:
    if part.ndim == 1 and np.issubdtype(part.dtype, np.integer):
        return table.rows(part.astype(np.int64, copy=False))
    if part.ndim != 2 or part.dtype != np.float32:
        raise BackendError(
            f"Part {index} of the prompt is {part.dtype}{list(part.shape)}: expected int64[N] "
            f"token ids or float32[N, {table.hidden_size}] embeddings."
        )
    if part.shape[1] != table.hidden_size:
        raise BackendError(
            f"Part {index} of the prompt has embeddings of width {part.shape[1]}, and the language "
            f"model takes {table.hidden_size}. The vision graph belongs to another model; build "
            "both from one checkpoint."
        )
    if not np.isfinite(part).all():
        raise BackendError(
            f"Part {index} of the prompt holds NaN or infinity, which would spoil every later "
            "answer of the conversation. The vision graph overflowed: build it with "
            "--precision fp32, or calibrate on frames like this one."
        )
    return part.astype(np.float32, copy=False)
