"""Check what enters a language model and what leaves it, for every backend.

The parts of a prompt become float32[N, D] rows, so that a NaN or a row of another width never
reaches a KV cache. Logits are checked before a token is chosen by them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.errors import BackendError
from runtime.language.embeddings import EmbeddingTable
from runtime.language.parts import Bias, Embeddings, Logits, Part, Positions


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
            "(--context) if the model allows it."
        )


def require_positions(
    positions: Positions, count: int, following: int, most: int, consecutive: str | None
) -> Positions:
    """Return the positions of ``count`` rows if a language model can take them.

    Args:
        positions: int64[N].
        count: how many rows there are.
        following: the position behind the last.
        most: positions the language model was trained for.
        consecutive: the name of a backend that takes no others.

    Raises:
        BackendError: it cannot.
    """
    if positions.shape != (count,):
        raise BackendError(
            f"There are positions [{', '.join(map(str, positions.shape))}] for {count} rows of a "
            "prompt. Give one for each."
        )
    if not 0 <= positions.min() <= positions.max() < most:
        raise BackendError(
            f"The prompt goes from position {positions.min()} to {positions.max()}, and the "
            f"language model was trained for 0 to {most - 1}. Ask a shorter question, drop earlier "
            "turns, or give pictures no more positions than they have tokens (--positions compact)."
        )
    if consecutive and not np.array_equal(positions, np.arange(following, following + count)):
        raise BackendError(
            f'The language backend "{consecutive}" takes consecutive positions only, and the '
            f"prompt leaves some out behind {following - 1}. Use --positions compact."
        )
    return positions


def require_bias(bias: Bias, count: int, equal: str | None) -> Bias:
    """Return the bias of ``count`` rows if a language model can take it.

    Args:
        bias: float32[N].
        count: how many rows there are.
        equal: the name of a backend to which all rows count the same.

    Raises:
        BackendError: it cannot.
    """
    if bias.shape != (count,) or bias.dtype != np.float32 or not np.isfinite(bias).all():
        raise BackendError(
            f"The bias of {count} rows of a prompt is {bias.dtype}{list(bias.shape)}: expected a "
            "finite float32 for each."
        )
    if equal and bias.any():
        raise BackendError(
            f'To the language backend "{equal}" all visual tokens count the same. Use '
            "--visual-weights equal."
        )
    return bias


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


def require_finite(logits: Logits, position: int) -> Logits:
    """Return logits that a token can be chosen by: no NaN, and a largest one that is a number.

    Args:
        logits: float32[V].
        position: how many positions came before.

    Raises:
        BackendError: they are not.
    """
    if not np.isfinite(logits.max()):  # NaN and infinity both become the largest
        wrong = np.flatnonzero(~np.isfinite(logits))
        raise BackendError(
            f"The language model's logits after {position} positions are not numbers: "
            f"{len(wrong)} of {len(logits)}, the first that of token {wrong[0]} "
            f"({logits[wrong[0]]}). Its weights or its precision overflow: build the bundle again "
            "with a higher --llm-precision."
        )
    return logits


def _rows_from_part(index: int, part: Part, table: EmbeddingTable) -> Embeddings:
    if part.ndim == 1 and np.issubdtype(part.dtype, np.integer):
        rows = table.rows(part.astype(np.int64, copy=False))
        wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(wrong):
            raise BackendError(
                f"The embedding of token {part[wrong[0]]} holds NaN or infinity. The bundle's "
                "language model is damaged; build the bundle again from a checkpoint that is whole."
            )
        return rows
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
    wrong = np.flatnonzero(~np.isfinite(part).all(axis=1))
    if len(wrong):
        raise BackendError(
            f"Part {index} of the prompt holds NaN or infinity (in {len(wrong)} of {len(part)} "
            f"visual tokens, the first is number {wrong[0]}), which would spoil every later answer "
            "of the conversation. The vision graph overflowed: build it with --precision fp32, or "
            "calibrate on frames like this one."
        )
    return part.astype(np.float32, copy=False)
