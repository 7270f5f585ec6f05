"""Share one budget of visual tokens among the frames of a clip by how much is new in each."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from engines.errors import OptionError


def share_tokens(newness: Sequence[float], budgets: Sequence[int], total: int) -> tuple[int, ...]:
    """Share a budget among frames.

    A frame of which a share is new needs no more than that share of the largest budget, so a camera
    that stands still costs one frame, whatever may be spent. Where not all needs can be met, the
    next step up goes to the frame with the most newness for a token; frames equally new are taken
    spread over time, the last one first. A frame that is newer never gets less.

    Args:
        newness: for each frame the share of it that is new, 0 to 1; in the order of time.
        budgets: what a frame can cost: the visual tokens of each graph.
        total: the most to spend on all.

    Returns:
        For each frame one of ``budgets``, or 0: it is left out. At least one is not.

    Raises:
        OptionError: no frames, or ``total`` is less than the smallest budget.
    """
    steps = sorted(set(budgets))
    if not newness:
        raise OptionError("There are no frames to share visual tokens among.")
    if total < steps[0]:
        raise OptionError(
            f"A clip is to cost {total} visual tokens at most, and one frame takes {steps[0]} at "
            f"least in this bundle. Allow more, or build the bundle with fewer, for example "
            f"`python -m export.build --tokens {max(total, 1)},{steps[0]}`."
        )
    rank = {frame: place for place, frame in enumerate(_spread_order(len(newness)))}
    levels = [0] * len(newness)  # how many steps each frame has been given
    needs = [_steps_needed(share, steps) for share in newness]
    if not any(needs):
        needs[-1] = 1
    left = total
    # The next step of each frame; what is too dear once is so ever after, since less is left.
    wanting = [(-newness[frame] / steps[0], rank[frame], frame) for frame in rank if needs[frame]]
    heapify(wanting)
    while wanting:
        _, _, frame = heappop(wanting)
        level = levels[frame]
        cost = steps[level] - (steps[level - 1] if level else 0)
        if cost > left:
            continue
        left -= cost
        levels[frame] = level = level + 1
        if level < needs[frame]:
            heappush(wanting, (-newness[frame] / steps[level], rank[frame], frame))
    return tuple(steps[level - 1] if level else 0 for level in levels)


def _steps_needed(share: float, steps: Sequence[int]) -> int:
    """Return how many steps up it takes to hold that share of the largest budget."""
    if share <= 0:
        return 0
    return 1 + sum(step < min(share, 1.0) * steps[-1] for step in steps)


def _spread_order(count: int) -> list[int]:
    """Return 0 .. count - 1 so that any beginning of it is spread over the whole, last one first.

    Each next one is the one farthest from all before it.
    """
    order = [count - 1]
    while len(order) < count:
        rest = (place for place in range(count) if place not in order)
        order.append(max(rest, key=lambda place: min(abs(place - taken) for taken in order)))
    return order
