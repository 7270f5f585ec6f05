"""Many questions about one picture in one sequence, each blind to the others.

Objects enter; token ids, targets, positions and a block mask leave. The picture's tokens are paid
for once and read by every question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from questions import Question
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from vocabulary import BOS, EOS, SYSTEM_PROMPT, build_tokenizer

IGNORED = -100


@dataclass(frozen=True)
class PackedText:
    """The text behind the image tokens, for a batch of B pictures.

    Attributes:
        ids: int64[B, T], padded with 0.
        targets: int64[B, T], the id that follows where it belongs to an answer, else -100.
        positions: int64[B, T], counted from the end of the picture within each conversation.
        blocks: int64[B, T], number of the conversation, -1 for padding.
        questions: int64[B, T], index into `asked` of the question a target belongs to.
        asked: every question, in order of its index.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    blocks: Tensor
    questions: Tensor
    asked: list[Question]


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@cache
def encode(text: str) -> tuple[int, ...]:
    """Return the token ids of a text as the saved tokenizer gives them."""
    return tuple(_tokenizer().encode(text, add_special_tokens=False))


@cache
def encode_prefix(with_system_prompt: bool) -> tuple[int, ...]:
    """Return the ids in front of the picture."""
    system = f"{SYSTEM_PROMPT} " if with_system_prompt else ""
    return encode(f"{BOS}{system}USER: ")


def pack(
    questions_per_picture: Sequence[Sequence[Question]],
    rng: np.random.Generator | None = None,
    chained_share: float = 0.0,
) -> PackedText:
    """Pack the questions of each picture behind its tokens.

    Args:
        questions_per_picture: for each picture.
        rng: draws which questions continue the conversation of the one before them.
        chained_share: share of such questions, so that a second turn is nothing new.
    """
    rows: list[list[tuple[int, int, int, int, int]]] = []
    asked: list[Question] = []
    for questions in questions_per_picture:
        row: list[tuple[int, int, int, int, int]] = []
        block, position = -1, 0
        for question in questions:
            chained = block >= 0 and rng is not None and rng.random() < chained_share
            if not chained:
                block, position = block + 1, 0
            turn = encode(f"{'USER: ' if chained else ''}{question.text} ASSISTANT:")
            answer = encode(f"{question.answer}{EOS}")
            ids = turn + answer
            targets = (IGNORED,) * (len(turn) - 1) + answer + (IGNORED,)
            for token, target in zip(ids, targets, strict=True):
                row.append((token, target, position, block, len(asked)))
                position += 1
            asked.append(question)
        rows.append(row)
    length = max(len(row) for row in rows)
    table = np.full((len(rows), length, 5), (0, IGNORED, 0, -1, 0), np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = np.array(row, np.int64).reshape(-1, 5)
    columns = [column.contiguous() for column in torch.from_numpy(table).unbind(-1)]
    return PackedText(columns[0], columns[1], columns[2], columns[3], columns[4], asked)


def block_mask(blocks: Tensor, before: int) -> Tensor:
    """Return the additive attention mask, float32[B, 1, S, S] with S = before + T.

    Everything before the text is causal; a text token sees all of that, and of the text only
    what precedes it in its own conversation.
    """
    batch, length = blocks.shape
    total = before + length
    allowed = torch.ones(total, total, dtype=torch.bool).tril().expand(batch, -1, -1).clone()
    same = blocks[:, :, None] == blocks[:, None, :]
    allowed[:, before:, before:] &= same
    return torch.zeros(allowed.shape).masked_fill_(~allowed, -1e4)[:, None]
