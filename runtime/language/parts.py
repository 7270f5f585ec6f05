"""The types of what language models take and give: token ids, embeddings, pictures and logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]
"""int64[N]."""
Embeddings = NDArray[np.float32]
"""float32[N, D]."""
Positions = NDArray[np.int64]
"""int64[N]; where rows stand for the rotary embedding, whatever place of a KV cache they take."""
Bias = NDArray[np.float32]
"""float32[N]; added to every score of attention to a row."""
Logits = NDArray[np.float32]
"""float32[V]."""
Part = TokenIds | Embeddings
"""What a language model is given at a time; visual tokens are embeddings."""


@dataclass(frozen=True)
class PlacedTokens:
    """The visual tokens of a picture, with where each stands and how much it counts.

    Attributes:
        tokens: float32[N, D].
        places: int64[N]; where each stands, 0 being the first position of the picture.
        length: positions that the picture takes, however many tokens are left of it.
        bias: float32[N]; the logarithm of how many tokens each counts for.
    """

    tokens: Embeddings
    places: Positions
    length: int
    bias: Bias

    def __len__(self) -> int:
        """Return how many tokens are left: so much of a KV cache they take."""
        return len(self.tokens)


Picture = Embeddings | PlacedTokens
"""The visual tokens of a picture; embeddings alone stand one after the other."""
PromptPart = Part | PlacedTokens
"""A piece of a prompt."""


@dataclass(frozen=True)
class PromptRows:
    """What a language model is given for a prompt.

    Attributes:
        parts: token ids and embeddings, N rows of them.
        positions: int64[N].
        bias: float32[N].
        following: the position of what comes next.
    """

    parts: list[Part]
    positions: Positions
    bias: Bias
    following: int


def rows_of_prompt(prompt: Sequence[PromptPart]) -> PromptRows:
    """Return what a language model is given for a prompt, and where it stands."""
    parts: list[Part] = []
    positions: list[Positions] = [np.zeros(0, np.int64)]
    bias: list[Bias] = [np.zeros(0, np.float32)]
    following = 0
    for part in prompt:
        if isinstance(part, PlacedTokens):
            parts.append(part.tokens)
            positions.append(following + part.places)
            bias.append(part.bias)
            following += part.length
        else:
            parts.append(part)
            positions.append(np.arange(following, following + len(part)))
            bias.append(np.zeros(len(part), np.float32))
            following += len(part)
    return PromptRows(parts, np.concatenate(positions), np.concatenate(bias), following)
