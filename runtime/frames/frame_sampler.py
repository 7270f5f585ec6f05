"""Take a few items spread evenly over a sequence of unknown length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")


class EvenSample(Generic[Item]):
    """Collects items in memory for twice as many as are wanted.

    Items are taken until there are twice as many as wanted. Then every other one is let go, and
    from there on only every second one of the sequence is looked at, and so on.

    Attributes:
        seen: items the sequence had so far.
        kept: those that are held, in their order.
    """

    def __init__(self, most: int) -> None:
        self.seen = 0
        self.kept: list[Item] = []
        self._most = most
        self._stride = 1

    def __len__(self) -> int:
        return min(len(self.kept), self._most)

    def wants_next(self) -> bool:
        """Say whether the next item of the sequence is to be looked at."""
        self.seen += 1
        return (self.seen - 1) % self._stride == 0

    def add(self, item: Item) -> None:
        """Hold an item that was wanted."""
        self.kept.append(item)
        if len(self.kept) == 2 * self._most:
            self.kept = self.kept[::2]
            self._stride *= 2

    def items(self) -> list[Item]:
        """Return at most as many as wanted, the first and the last of those held among them."""
        return pick_evenly(self.kept, self._most)


def pick_evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most so many of some items, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in places]
