"""A regular grid of rows x columns over the square of patches, for the reducers that need one."""

from __future__ import annotations

from math import isqrt

from engines.errors import OptionError


def grid_of(reducer: str, tokens: int, patches: int) -> tuple[int, int]:
    """Return the rows and columns of ``tokens`` cells, as nearly square as they come.

    Args:
        reducer: its name, for the error.
        tokens: rows x columns, neither larger than the square's side.
        patches: of the tower.

    Raises:
        OptionError: the patches are no square, or the tokens are no grid that fits in it.
    """
    side = isqrt(patches)
    other = "uniform with layout=sequential" if reducer == "uniform" else "uniform"
    if side * side != patches:
        raise OptionError(
            f"reducer {reducer}: the tower has {patches} patches, expected a square number of them."
            f" Use the reducer {other} instead."
        )
    shape = _shape_of(tokens, side)
    if shape is None:
        near = sorted(
            (n for n in range(1, patches + 1) if _shape_of(n, side)),
            key=lambda n: abs(n - tokens),
        )
        raise OptionError(
            f"reducer {reducer}: {tokens} tokens cannot be laid out as rows x columns within "
            f"{side} x {side} patches. Ask for {near[0]} or {near[1]}."
        )
    return shape


def _shape_of(tokens: int, side: int) -> tuple[int, int] | None:
    for rows in range(min(isqrt(tokens), side), 0, -1):
        if tokens % rows == 0 and tokens // rows <= side:
            return rows, tokens // rows
    return None
