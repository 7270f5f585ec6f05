"""Share one budget over all squares of a picture: those of their tokens that are worth most stay.

A reducer ranks the tokens of each square and says what each added when it was taken, which never
rises along the ranking. So what stays of a square is the beginning of its ranking: what the same
reducer leaves with a smaller budget. A square that shows little gives its share to one that shows
more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.errors import OptionError
from runtime.vision.visual_tokens import VisualTokens


def share_budget(squares: VisualTokens, candidates: NDArray[np.bool_], total: int) -> VisualTokens:
    """Return the squares with ``total`` tokens at most, all of them together.

    Of tokens worth the same, those of the square that comes first stay; within it those that were
    taken first, or of merged ones, which have no order, those that stand first.

    Args:
        squares: of one picture, with `VisualTokens.worth`.
        candidates: bool[S, N]; which slots hold a token that may stay. What shows nothing but
            padding is none, so that it takes nothing of the budget.
        total: the budget.

    Returns:
        The same squares with as many slots; see `VisualTokens.only`.

    Raises:
        OptionError: the tokens do not say what they are worth.
    """
    if squares.worth is None:
        raise OptionError(
            f"{total} visual tokens were to be shared by all squares of a picture, and its graph "
            "does not say what a token is worth. Build the bundle again with "
            f"`python -m export.build --picture-tokens {total} --reducer scope`."
        )
    slots = squares.tokens.shape[1]
    rank = squares.order
    if rank is None:
        rank = np.broadcast_to(np.arange(slots), candidates.shape)
    square, slot = np.nonzero(candidates)
    # By worth; then by square; then by rank.
    first = np.lexsort((rank[square, slot], square, -squares.worth[square, slot]))[:total]
    kept = np.zeros_like(candidates)
    kept[square[first], slot[first]] = True
    return squares.only(kept, slots)
