"""Put the tokens of a picture's tiles into one sequence, row by row over the whole picture.

The tokens of the whole view come first, in their own order. Those of the tiles follow as if the
tiles were one large picture: a token that stands for a patch stands where the patch is, and a
newline ends each row that has a token. What a tile puts before its first patch (a class token) and
what stands for no single patch (merged tokens) comes behind the rows, first the former of all
tiles, then the latter, tile by tile. So does VisionZip's released code, which has no newlines.

In a tile in which no token stands for a patch (`pool`), each stands at the first of its patches.
A token all of whose patches lie in the padding is dropped: nobody has seen anything there.

A newline that is left after reduction says: what follows lies in a lower row of the picture. Rows
without a token leave none, so newlines do not count rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.vision.visual_tokens import VisualTokens

Indices = NDArray[np.int64]
_NOWHERE = -1


@dataclass(frozen=True)
class PatchGrid:
    """The patches of all tiles of a picture as one grid, and the part of it that is not padding.

    Attributes:
        patches: int64[R, C]; tile by tile, where the patch is in int64[tiles * P].
        top: first row inside the picture.
        bottom: one behind the last.
        left: first column.
        right: one behind the last.
    """

    patches: Indices
    top: int
    bottom: int
    left: int
    right: int

    @property
    def box(self) -> tuple[slice, slice]:
        """The rows and columns inside the picture."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows and columns are inside the picture."""
        return self.bottom - self.top, self.right - self.left

    def places(self) -> Indices:
        """Return the place of each patch in reading order, int64[tiles * P]; -1 in the padding."""
        rows, columns = self.patches.shape
        inside = np.full((rows, columns), _NOWHERE, np.int64)
        numbers = np.arange(rows * columns).reshape(rows, columns)
        inside[self.box] = numbers[self.box]
        places = np.empty(rows * columns, np.int64)
        places[self.patches.ravel()] = inside.ravel()
        return places


def assemble_tiles(
    squares: VisualTokens, grid: PatchGrid, newline: NDArray[np.float32] | None
) -> VisualTokens:
    """Return the tokens of one picture.

    Args:
        squares: of its view and its tiles, a batch of 1 + tiles.
        grid: of its tiles.
        newline: float32[D], what ends a row; None: nothing does.

    Returns:
        A batch of one. Patch p of square s is number s * P + p in it; a newline stands for no
        patch.
    """
    count, patches = squares.assignment.shape
    slots = squares.tokens.shape[1]
    real = np.arange(slots) < squares.valid[:, None]  # [S, N]
    order, rows = _order_of_tiles(squares, real, grid)
    whole = np.flatnonzero(real[0])  # of the first square, slot and number are the same
    taken = np.concatenate([whole, order + slots])  # numbers s * N + n
    tokens = squares.tokens.reshape(count * slots, -1)
    origin = np.where(
        squares.origin >= 0, squares.origin + np.arange(count)[:, None] * patches, _NOWHERE
    ).ravel()[taken]
    ends = len(whole) + 1 + np.flatnonzero(np.diff(rows, append=_NOWHERE)) if len(rows) else rows
    places = np.arange(len(taken))  # in the sequence
    sequence, origins = tokens[taken], origin
    if newline is not None and len(ends):
        places = places + np.searchsorted(ends, places, side="right")
        sequence = np.insert(sequence, ends, newline, axis=0)
        origins = np.insert(origins, ends, _NOWHERE)
    return VisualTokens(
        tokens=sequence[None],
        valid=np.array([len(sequence)]),
        origin=origins[None],
        assignment=_moved(squares.assignment, slots, taken, places)[None],
        milliseconds=squares.milliseconds,
        square_budget=slots,
    )


def tokens_inside(squares: VisualTokens, grid: PatchGrid) -> NDArray[np.bool_]:
    """Return which slots hold a token that is not of the padding alone, bool[S, N].

    Args:
        squares: the whole view and the tiles.
        grid: of the tiles' patches.
    """
    real = np.arange(squares.tokens.shape[1]) < squares.valid[:, None]
    at = _PlacesOfTokens.of(squares, real, grid)
    return np.concatenate([real[:1], at.inside])


@dataclass(frozen=True)
class _PlacesOfTokens:
    """Where the tiles' tokens lie in the picture.

    Attributes:
        stands: bool[tiles, N]; it stands for a patch.
        place: int64[tiles, N]; of that patch, -1 in the padding or where there is none.
        first: int64[tiles, N]; the first place of all patches in it, -1 where there is none.
        members: int64[tiles, N]; how many patches are in it.
        inside: bool[tiles, N]; it is a token, and not of the padding alone.
    """

    stands: NDArray[np.bool_]
    place: Indices
    first: Indices
    members: Indices
    inside: NDArray[np.bool_]

    @classmethod
    def of(cls, squares: VisualTokens, real: NDArray[np.bool_], grid: PatchGrid) -> _PlacesOfTokens:
        """Find them; real: bool[S, N], which slots hold a token."""
        tiles, slots = real.shape[0] - 1, real.shape[1]
        places = grid.places()  # [tiles * P]
        origin, assignment = squares.origin[1:], squares.assignment[1:]
        numbers = np.arange(tiles)[:, None] * assignment.shape[1] + origin  # [tiles, N]
        stands = real[1:] & (origin >= 0)
        place = np.where(stands, places[np.where(stands, numbers, 0)], _NOWHERE)
        found = _first_places(assignment, places.reshape(tiles, -1), slots)
        first, members = (each.reshape(tiles, slots) for each in found)
        seen = np.where(stands, place >= 0, (members == 0) | (first >= 0))
        return cls(stands, place, first, members, real[1:] & seen)


def _order_of_tiles(
    squares: VisualTokens, real: NDArray[np.bool_], grid: PatchGrid
) -> tuple[Indices, Indices]:
    """Return the tiles' tokens in order, as tile * N + slot, and the rows of those that have one.

    Args:
        squares: the whole view and the tiles.
        real: bool[S, N]; which slots hold a token.
        grid: of the tiles' patches.
    """
    lie = _PlacesOfTokens.of(squares, real, grid)
    some = lie.stands.any(axis=1, keepdims=True)  # of each tile, whether any stands for a patch
    place = np.where(~some & (lie.members > 0), lie.first, lie.place).ravel()
    leads = real[1:] & some
    leads &= np.arange(real.shape[1]) < lie.stands.argmax(axis=1, keepdims=True)  # before any patch
    group = np.where(place >= 0, 0, np.where(leads.ravel(), 1, 2))
    at = np.flatnonzero(lie.inside)
    at = at[np.lexsort((at, place[at], group[at]))]
    placed = place[at][group[at] == 0]
    return at, placed // grid.patches.shape[1]


def _first_places(assignment: Indices, places: Indices, slots: int) -> tuple[Indices, Indices]:
    """Return of each token the first place of its patches, -1 if none, and how many it has.

    Args:
        assignment: int64[tiles, P].
        places: int64[tiles, P]; -1 in the padding.
        slots: N.

    Returns:
        int64[tiles * N] twice.
    """
    tiles = assignment.shape[0]
    slot = np.where(assignment < -1, -assignment - 2, assignment)  # [tiles, P]
    has = slot >= 0
    number = (np.arange(tiles)[:, None] * slots + slot)[has]
    members = np.bincount(number, minlength=tiles * slots)
    nowhere = np.iinfo(np.int64).max
    first = np.full(tiles * slots, nowhere)
    np.minimum.at(first, number, np.where(places[has] < 0, nowhere, places[has]))
    return np.where(first == nowhere, _NOWHERE, first), members


def _moved(assignment: Indices, slots: int, taken: Indices, places: Indices) -> Indices:
    """Return what became of each patch in terms of the sequence, int64[S * P].

    Args:
        assignment: int64[S, P], in terms of each square's slots.
        slots: N.
        taken: tokens that are in the sequence, as square * N + slot.
        places: where each of them is in the sequence.
    """
    squares = assignment.shape[0]
    place = np.full(squares * slots, _NOWHERE, np.int64)
    place[taken] = places
    slot = np.where(assignment < -1, -assignment - 2, assignment)
    number = np.arange(squares)[:, None] * slots + np.maximum(slot, 0)
    moved = np.where(slot >= 0, place[number], _NOWHERE)
    merged = (assignment < -1) & (moved >= 0)
    return np.where(merged, -moved - 2, moved).ravel()
