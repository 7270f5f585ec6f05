"""Draw what the language model is shown of a picture: kept, merged and dropped patches.

Every patch is drawn in its place (back through crop, resize and padding), with a legend below. A
picture that was cut into tiles is drawn twice: the whole view's patches, then the tiles'. Kept
patches are bright and outlined. A target and the patches merged into it share one colour. Patches
that are in no token are dim.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from engines.bundle import Bundle
from engines.errors import OptionError
from engines.staging import staged_file
from runtime.vision.layouts import View, views_of
from runtime.vision.resize import Pixels
from runtime.vision.visual_tokens import VisualTokens

_SHORTEST, _LONGEST = 768, 1600  # pixels along the longer side: small enough to mail, sharp lines
_NARROWEST = 360  # the legend must fit
_GAP = 8  # between the views of a picture that was cut into tiles
_PAPER, _INK = (18, 20, 24), (235, 238, 242)
_KEPT_LINE = (255, 255, 255)
_MARK = (255, 45, 45)
_DIM = np.array([0.30, 0.33, 0.38])  # what is left of the light of a dropped patch
_UNSEEN = np.array([0.10, 0.11, 0.13])  # and of what lies outside the crop

KEPT, TARGET, MERGED, DROPPED = range(4)


@dataclass(frozen=True)
class PatchFates:
    """What became of each patch.

    Attributes:
        kind: int64[P]; `KEPT`, `TARGET`, `MERGED` or `DROPPED`.
        slot: int64[P]; the token it is in, -1 for none.
    """

    kind: NDArray[np.int64]
    slot: NDArray[np.int64]

    def of(self, patches: NDArray[np.int64]) -> PatchFates:
        """Return those of some patches."""
        return PatchFates(kind=self.kind[patches], slot=self.slot[patches])

    def count(self, kind: int) -> int:
        """Return how many patches are of a kind."""
        return int((self.kind == kind).sum())


def patch_fates(assignment: NDArray[np.int64], origin: NDArray[np.int64]) -> PatchFates:
    """Read `VisualTokens.assignment` and `origin` of one picture.

    A patch a token was made from is kept when the token stands for it, and a target when the token
    stands for a group (its origin is -1).

    Args:
        assignment: int64[P].
        origin: int64[N].
    """
    made = assignment >= 0
    merged = assignment < -1
    slot = np.where(merged, -assignment - 2, assignment)
    stands_for_itself = made & (origin[np.maximum(slot, 0)] >= 0)
    kind = np.select([stands_for_itself, made, merged], [KEPT, TARGET, MERGED], DROPPED)
    return PatchFates(kind=kind, slot=slot)


def save_overlay(
    path: str | os.PathLike[str], picture: Pixels, seen: VisualTokens, bundle: Bundle, at: int = 0
) -> None:
    """Draw the overlay and write it whole or not at all.

    Args:
        path: the PNG file to write.
        picture: RGB, uint8[H, W, 3]; the one that was encoded.
        seen: what became of it.
        bundle: whose graph encoded it.
        at: which picture of the batch.

    Raises:
        OptionError: not a .png, or it cannot be written.
    """
    goal = Path(path)
    if goal.suffix.lower() != ".png":
        raise OptionError(f"The overlay {goal} is not a .png file. Name it {goal.stem}.png.")
    image = Image.fromarray(draw_overlay(picture, seen, bundle, at))
    with staged_file(goal, OptionError) as staged:
        image.save(staged, "PNG")


def draw_overlay(
    picture: Pixels,
    seen: VisualTokens,
    bundle: Bundle,
    at: int = 0,
    *,
    marked: Collection[int] = (),
) -> Pixels:
    """Draw the patches of one picture over it.

    Args:
        picture: RGB, uint8[H, W, 3]; the one that was encoded.
        seen: what became of it.
        bundle: whose graph encoded it.
        at: which picture of the batch.
        marked: patches to cross out in red, such as those that another engine keeps instead.

    Returns:
        RGB, uint8[H', W', 3], of the picture's proportions with a legend below.
    """
    fates = patch_fates(seen.assignment[at], seen.origin[at])
    height, width = picture.shape[:2]
    views = views_of(bundle, bundle.vision(seen.budget), (height, width), seen.shown)
    canvas = _sized(picture)
    scales = canvas.shape[0] / height, canvas.shape[1] / width
    panels = [_draw_view(canvas, view, scales, fates, marked) for view in views]
    drawn = _joined(panels)
    shown = fates.of(np.concatenate([view.patches.ravel() for view in views]))
    legend = _legend(max(drawn.width, _NARROWEST), shown, tokens=int(seen.valid[at]))
    page = Image.new("RGB", (legend.width, drawn.height + legend.height), _PAPER)
    page.paste(drawn, ((page.width - drawn.width) // 2, 0))
    page.paste(legend, (0, drawn.height))
    return np.asarray(page)


def _draw_view(
    canvas: Pixels,
    view: View,
    scales: tuple[float, float],
    fates: PatchFates,
    marked: Collection[int],
) -> Image.Image:
    """Draw the patches of one view over the picture."""
    grid = _Grid(
        np.rint(view.rows * scales[0]).astype(np.int64),
        np.rint(view.columns * scales[1]).astype(np.int64),
    )
    mine = fates.of(view.patches.ravel())
    line = max(2, round(max(canvas.shape[:2]) / 400))
    drawn = _shaded(canvas, grid, mine)
    _outline(drawn, grid, mine, line)
    _mark(drawn, grid, np.flatnonzero(np.isin(view.patches, list(marked))).tolist(), line)
    return drawn


def _joined(panels: Sequence[Image.Image]) -> Image.Image:
    """Put pictures of one size together, along their shorter side."""
    first = panels[0]
    across, down = (first.width + _GAP, 0), (0, first.height + _GAP)
    step = down if first.width > first.height else across
    last = len(panels) - 1
    whole = Image.new("RGB", (first.width + last * step[0], first.height + last * step[1]), _PAPER)
    for at, panel in enumerate(panels):
        whole.paste(panel, (at * step[0], at * step[1]))
    return whole


def _sized(picture: Pixels) -> Pixels:
    """Scale a picture so that lines and legend can be read, proportions kept."""
    height, width = picture.shape[:2]
    scale = min(max(1.0, _SHORTEST / max(height, width)), _LONGEST / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class _Grid:
    """Edges of the patches on the canvas, in pixels: rows + 1 and columns + 1 of them."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]

    def patch_of_pixels(self, height: int, width: int) -> NDArray[np.int64]:
        """Return the patch each pixel belongs to, int64[height, width]; -1 outside the crop."""
        row = np.searchsorted(self.rows, np.arange(height), side="right") - 1
        column = np.searchsorted(self.columns, np.arange(width), side="right") - 1
        rows, columns = len(self.rows) - 1, len(self.columns) - 1
        patch = row[:, None] * columns + column[None, :]
        inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))
        return np.where(inside, patch, -1)


def _shaded(canvas: Pixels, grid: _Grid, fates: PatchFates) -> Image.Image:
    """Light each pixel by the fate of its patch."""
    light = canvas.astype(np.float32)
    grey = light @ np.array([0.299, 0.587, 0.114], np.float32)  # [H, W]
    patch = grid.patch_of_pixels(*canvas.shape[:2])
    kind = np.where(patch >= 0, fates.kind[patch], -1)
    tint = _colours(fates)[np.where(patch >= 0, fates.slot[patch], -1)]  # [H, W, 3]
    shaded = grey[:, :, None] * _UNSEEN
    shaded = np.where((kind == DROPPED)[:, :, None], grey[:, :, None] * _DIM, shaded)
    tinted = tint * (0.12 + 0.34 * grey[:, :, None] / 255) + grey[:, :, None] * 0.16
    shaded = np.where((kind == MERGED)[:, :, None], tinted, shaded)
    bright = (kind == KEPT) | (kind == TARGET)
    return Image.fromarray(np.where(bright[:, :, None], light, shaded).astype(np.uint8))


def _colours(fates: PatchFates) -> NDArray[np.float32]:
    """Return a colour per token, float32[N + 1, 3]; neighbours in order are far apart in hue."""
    slots = int(fates.slot.max(initial=0)) + 2
    groups = np.unique(fates.slot[(fates.kind == TARGET) | (fates.kind == MERGED)])
    colours = np.full((slots, 3), 128, np.float32)
    for turn, slot in enumerate(groups):
        hue = (0.55 + turn * 0.618034) % 1.0  # the golden angle
        colours[slot] = _rgb(hue)
    return colours


def _rgb(hue: float) -> NDArray[np.float32]:
    """Return a vivid colour of a hue from 0 to 1."""
    ramp = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return np.asarray(255 * (0.25 + 0.75 * np.clip(ramp, 0, 1)), np.float32)


def _outline(image: Image.Image, grid: _Grid, fates: PatchFates, line: int) -> None:
    """Outline kept patches where they border on others, and each target all around."""
    pen = ImageDraw.Draw(image)
    shape = (len(grid.rows) - 1, len(grid.columns) - 1)
    kept = np.pad((fates.kind == KEPT).reshape(shape), 1)
    colours = _colours(fates).astype(int)
    for row, column in np.ndindex(shape):
        patch = row * shape[1] + column
        top, bottom = int(grid.rows[row]), int(grid.rows[row + 1]) - 1
        left, right = int(grid.columns[column]), int(grid.columns[column + 1]) - 1
        if bottom < top or right < left:
            continue
        if fates.kind[patch] == TARGET:
            colour = tuple(colours[fates.slot[patch]].tolist())
            pen.rectangle((left, top, right, bottom), outline=colour, width=line + 1)
        if fates.kind[patch] != KEPT:
            continue
        above, below = kept[row, column + 1], kept[row + 2, column + 1]
        before, after = kept[row + 1, column], kept[row + 1, column + 2]
        edge = line - 1
        for side, box in (
            (above, (left, top, right, top + edge)),
            (below, (left, bottom - edge, right, bottom)),
            (before, (left, top, left + edge, bottom)),
            (after, (right - edge, top, right, bottom)),
        ):
            if not side:
                pen.rectangle(box, fill=_KEPT_LINE)


def _mark(image: Image.Image, grid: _Grid, patches: Collection[int], line: int) -> None:
    pen = ImageDraw.Draw(image)
    for patch in patches:
        row, column = divmod(patch, len(grid.columns) - 1)
        left, right = int(grid.columns[column]), int(grid.columns[column + 1]) - 1
        top, bottom = int(grid.rows[row]), int(grid.rows[row + 1]) - 1
        if top <= bottom and left <= right:
            pen.rectangle((left, top, right, bottom), outline=_MARK, width=line + 1)
            pen.line((left, top, right, bottom), fill=_MARK, width=line)
            pen.line((left, bottom, right, top), fill=_MARK, width=line)


def _legend(width: int, fates: PatchFates, tokens: int) -> Image.Image:
    """Draw the strip below: a swatch and a count of each kind, tokens of patches at the right."""
    size = max(11, min(22, width // 42))
    font = ImageFont.load_default(size)
    target = "target" if fates.count(TARGET) == 1 else "targets"
    names = {KEPT: "kept", TARGET: target, MERGED: "merged", DROPPED: "dropped"}
    entries = [(kind, f"{fates.count(kind)} {name}") for kind, name in names.items()]
    entries = [entry for entry in entries if fates.count(entry[0])]
    total = f"{tokens} visual tokens from {len(fates.kind)} patches"
    swatch, gap = size, size // 2
    widths = [swatch + gap + round(font.getlength(text)) + 2 * gap for _, text in entries]
    one_row = sum(widths) + round(font.getlength(total)) + 2 * gap <= width
    height = round(size * (2.2 if one_row else 3.8))
    legend = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(legend)
    middle = round(size * 1.1)
    x = gap
    for (kind, text), entry_width in zip(entries, widths, strict=True):
        _draw_swatch(pen, kind, (x, middle - swatch // 2), swatch)
        pen.text((x + swatch + gap, middle), text, fill=_INK, font=font, anchor="lm")
        x += entry_width
    where = (width - gap, middle, "rm") if one_row else (gap, round(size * 2.7), "lm")
    pen.text(where[:2], total, fill=_INK, font=font, anchor=where[2])
    return legend


def _draw_swatch(pen: ImageDraw.ImageDraw, kind: int, corner: tuple[int, int], size: int) -> None:
    x, y = corner
    box = (x, y, x + size - 1, y + size - 1)
    blue, orange = (tuple(_rgb(hue).astype(int).tolist()) for hue in (0.55, 0.168))
    if kind == KEPT:
        pen.rectangle(box, fill=(150, 155, 165), outline=_KEPT_LINE, width=2)
    elif kind == TARGET:
        pen.rectangle(box, fill=(150, 155, 165), outline=blue, width=3)
    elif kind == MERGED:
        pen.rectangle(box, fill=tuple(value * 6 // 10 for value in blue))
        pen.polygon([(x + size - 1, y), (x + size - 1, y + size - 1), (x, y + size - 1)],
                    fill=tuple(value * 6 // 10 for value in orange))  # fmt: skip
    else:
        pen.rectangle(box, fill=(44, 48, 56))
