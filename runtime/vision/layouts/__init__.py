"""Picture layouts: how a picture becomes squares for the tower, and their tokens one sequence.

`layout` says what a layout does; each of the others is one. Adding one is a file here, a record in
`engines.picture_tiles` and a branch below.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from engines.bundle import Bundle
from engines.errors import BundleError
from engines.manifest import Preprocessing, VisionGraph
from engines.picture_tiles import ALL_TOKENS, NEWLINE, PictureTiles
from runtime.vision.layouts.frame_square import FrameSquare
from runtime.vision.layouts.layout import Layout, Size, View
from runtime.vision.layouts.llava_next import LlavaNext
from runtime.vision.layouts.padded_square import PaddedSquare
from runtime.vision.layouts.square import Square
from runtime.vision.visual_tokens import Shown

__all__ = ["Layout", "View", "layout_from", "layout_of", "newline_of", "views_of"]


def layout_of(bundle: Bundle, graph: VisionGraph, shown: Shown = "alone") -> Layout:
    """Return the layout of a bundle's pictures.

    Args:
        bundle: from `open_bundle`.
        graph: one of its graphs; where it leaves every token, every row ends with a newline, and a
            frame is pooled.
        shown: how the pictures are shown.

    Raises:
        BundleError: the file of the newline is damaged or of another model.
    """
    tiles = bundle.manifest.tiles
    newline = None
    if tiles is not None and (tiles.newlines == "rows" or graph.reducer.name == ALL_TOKENS):
        newline = newline_of(bundle, tiles)
    return _layout(bundle, graph, newline, shown)


def views_of(
    bundle: Bundle, graph: VisionGraph, size: Size, shown: Shown = "alone"
) -> tuple[View, ...]:
    """Return how the patches that a graph sees lie over a picture, the coarsest view first.

    Args:
        bundle: from `open_bundle`.
        graph: one of its graphs.
        size: height and width of the picture, in pixels.
        shown: how the picture was shown.
    """
    return _layout(bundle, graph, None, shown).views(size)


def layout_from(
    preprocessing: Preprocessing, tiles: PictureTiles | None, patches: tuple[int, int]
) -> Layout:
    """Return a layout that cuts pictures where there is no bundle yet, without newlines.

    Args:
        preprocessing: of the whole picture.
        tiles: how a picture is cut; None where it is one square.
        patches: rows and columns of a square.
    """
    if tiles is None:
        return Square(preprocessing, *patches)
    return LlavaNext(preprocessing, tiles, *patches, newline=None)


def _layout(
    bundle: Bundle, graph: VisionGraph, newline: NDArray[np.float32] | None, shown: Shown
) -> Layout:
    tiles, patches = bundle.manifest.tiles, (graph.patch_rows, graph.patch_columns)
    all_tokens = graph.reducer.name == ALL_TOKENS
    if shown == "frame" and bundle.clips is not None:
        pooled = bundle.clips.pooled(*patches) if all_tokens else None
        return FrameSquare(bundle.preprocessing, *patches, pooled)
    if shown == "among_others" and bundle.squares_of_several:
        padded = bundle.preprocessing.model_copy(update={"pad_to_square": True})
        return PaddedSquare(padded, *patches, newline)
    layout = layout_from(bundle.preprocessing, tiles, patches)
    if isinstance(layout, LlavaNext):
        return replace(layout, newline=newline, all_tokens=all_tokens)
    return layout


def newline_of(bundle: Bundle, tiles: PictureTiles) -> NDArray[np.float32]:
    """Return what ends a row or a clip, float32[D].

    Raises:
        BundleError: the file does not hold it.
    """
    file = bundle.path(tiles.newline)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(
            f"{file} is not a readable safetensors file ({error}). Build the bundle again."
        ) from error
    width = bundle.manifest.text.hidden_size
    newline = tensors.get(NEWLINE)
    if newline is None or newline.dtype != np.float32 or newline.shape != (width,):
        held = {name: f"{each.dtype}{list(each.shape)}" for name, each in tensors.items()}
        raise BundleError(
            f"{file} holds {held}, expected {NEWLINE} float32[{width}]. Build the bundle again."
        )
    if not np.isfinite(newline).all():
        raise BundleError(f"{file}: {NEWLINE} holds NaN or infinity. Build the bundle again.")
    return newline
