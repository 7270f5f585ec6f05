"""The visual tokens of pictures, and which patches each was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines.errors import OptionError

Shown = Literal["alone", "among_others", "frame"]
"""How an image is shown: as the only picture of a conversation, as one of several, or as a frame of
a clip that has one place in the prompt. To most checkpoints it is the same."""


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of a batch of images.

    Attributes:
        tokens: float32[B, N, D] in the language model's width; zeros beyond ``valid``.
        valid: int64[B]; how many of the N tokens are real.
        origin: int64[B, N], the graph's output `patch_index`; the patch a token stands for, -1
            where it is no single patch.
        assignment: int64[B, P]; what became of each patch. ``slot >= 0``: token ``slot`` was made
            from it; ``-(slot + 2)``: merged into token ``slot``; ``-1``: in no token.
        milliseconds: time of the stages ``"preprocess"`` and ``"encode"``, for the whole batch.
        order: int64[B, N], the graph's output `token_order`; each token's place in the reducer's
            ranking, -1 for padding. None where it does not rank.
        worth: float32[B, N], the graph's output `token_worth`; what each token added when the
            reducer took it. None where the graph does not say it.
        square_budget: of a picture that was cut into squares, the most tokens of each; N and P are
            of all squares together, and N differs from picture to picture.
        shown: how it was turned into squares.
    """

    tokens: NDArray[np.float32]
    valid: NDArray[np.int64]
    origin: NDArray[np.int64]
    assignment: NDArray[np.int64]
    milliseconds: dict[str, float]
    order: NDArray[np.int64] | None = None
    worth: NDArray[np.float32] | None = None
    square_budget: int | None = None
    shown: Shown = "alone"

    @property
    def budget(self) -> int:
        """Which of a bundle's budgets this is."""
        return self.tokens.shape[1] if self.square_budget is None else self.square_budget

    def tokens_of(self, at: int) -> NDArray[np.float32]:
        """Return the real tokens of one image of the batch, float32[valid, D]."""
        return self.tokens[at, : self.valid[at]]

    def part(self, rows: slice) -> VisualTokens:
        """Return some of the batch, with the time of all."""
        return replace(
            self,
            tokens=self.tokens[rows],
            valid=self.valid[rows],
            origin=self.origin[rows],
            assignment=self.assignment[rows],
            order=None if self.order is None else self.order[rows],
            worth=None if self.worth is None else self.worth[rows],
        )

    def split(self) -> list[VisualTokens]:
        """Return each image by itself, with its share of the batch's time."""
        count = len(self.tokens)
        share_ms = {stage: ms / count for stage, ms in self.milliseconds.items()}
        return [replace(self.part(slice(at, at + 1)), milliseconds=share_ms) for at in range(count)]

    @classmethod
    def stacked(
        cls, pictures: Sequence[VisualTokens], milliseconds: dict[str, float]
    ) -> VisualTokens:
        """Return pictures with different numbers of tokens as one batch, padded at the end.

        Args:
            pictures: a batch of one each, without an order.
            milliseconds: of all.
        """
        if len(pictures) == 1:
            return replace(pictures[0], milliseconds=milliseconds)
        return cls(
            tokens=_padded([one.tokens for one in pictures], 0),
            valid=np.concatenate([one.valid for one in pictures]),
            origin=_padded([one.origin for one in pictures], -1),
            assignment=_padded([one.assignment for one in pictures], -1),
            milliseconds=milliseconds,
            square_budget=pictures[0].square_budget,
            shown=pictures[0].shown,
        )

    def first(self, count: int) -> VisualTokens:
        """Return the first ``count`` tokens by rank, in spatial order as all of them are.

        They are what the same reducer leaves with a budget of ``count``.

        Raises:
            OptionError: there are no more than that, or the reducer does not rank: what it merged
                depends on its budget, so a smaller one has other tokens.
        """
        if count == self.budget:
            return self
        if self.order is None or not 0 < count < self.tokens.shape[1]:
            reason = "has merged or does not rank them" if self.order is None else "leaves no more"
            raise OptionError(
                f"{count} of {self.tokens.shape[1]} visual tokens were asked for, and the reducer "
                f"{reason}. Build the bundle with a budget of {count} as well: "
                f"python -m export.build --tokens {count},{self.tokens.shape[1]}."
            )
        return self.only((self.order >= 0) & (self.order < count), count)

    def only(self, kept: NDArray[np.bool_], slots: int) -> VisualTokens:
        """Return some of the tokens of each image, in the order they had, then padding.

        A patch in a token that is not among them is in none.

        Args:
            kept: bool[B, N]; real tokens, at most ``slots`` of each image.
            slots: the new N.
        """
        at = np.argsort(~kept, axis=1, kind="stable")[:, :slots]  # the kept ones, then padding
        real = np.take_along_axis(kept, at, 1)  # [B, slots]

        def picked(values: NDArray[Any], filler: int) -> NDArray[Any]:
            return np.where(real, np.take_along_axis(values, at, 1), values.dtype.type(filler))

        place = np.where(kept, kept.cumsum(axis=1) - 1, -1)  # [B, N], where each is now
        slot = np.where(self.assignment < -1, -self.assignment - 2, self.assignment)  # [B, P]
        moved = np.where(slot >= 0, np.take_along_axis(place, slot.clip(min=0), 1), -1)
        merged = (self.assignment < -1) & (moved >= 0)
        return replace(
            self,
            tokens=np.where(
                real[:, :, None], np.take_along_axis(self.tokens, at[:, :, None], 1), np.float32(0)
            ),
            valid=real.sum(axis=1),
            origin=picked(self.origin, -1),
            assignment=np.where(merged, -moved - 2, moved),
            order=None if self.order is None else picked(self.order, -1),
            worth=None if self.worth is None else picked(self.worth, 0),
        )


def _padded(rows: Sequence[NDArray[Any]], filler: int) -> NDArray[Any]:
    """Return [1, N, ...] of different N as [B, largest N, ...]."""
    longest = max(row.shape[1] for row in rows)
    whole = np.full((len(rows), longest, *rows[0].shape[2:]), filler, rows[0].dtype)
    for at, row in enumerate(rows):
        whole[at, : row.shape[1]] = row[0]
    return whole
