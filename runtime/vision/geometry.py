"""Compute where the pixels of `pixel_values` lie in the picture they were made from.

`preprocess` follows these sizes and offsets, and `overlay` uses them to go back.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.errors import BundleError
from engines.manifest import Preprocessing


@dataclass(frozen=True)
class Geometry:
    """Sizes and offsets, in pixels: picture -> padded -> resized -> cropped.

    Attributes:
        height: of the picture.
        width: of the picture.
        pad_top: rows above the picture once it is padded to a square.
        pad_left: columns left of it.
        padded_height: after padding; without padding the picture's.
        padded_width: after padding.
        resized_height: after resizing.
        resized_width: after resizing.
        crop_top: first row of the resized picture that is kept; negative where the crop is larger,
            and then filled with zeros.
        crop_left: first column, likewise.
        crop_height: rows of `pixel_values`.
        crop_width: columns of `pixel_values`.
    """

    height: int
    width: int
    pad_top: int
    pad_left: int
    padded_height: int
    padded_width: int
    resized_height: int
    resized_width: int
    crop_top: int
    crop_left: int
    crop_height: int
    crop_width: int

    def in_picture(self, row: float, column: float) -> tuple[float, float]:
        """Return the picture's (row, column) at a point of `pixel_values`; it may lie outside."""
        return (
            (row + self.crop_top) * self.padded_height / self.resized_height - self.pad_top,
            (column + self.crop_left) * self.padded_width / self.resized_width - self.pad_left,
        )


def lay_out(height: int, width: int, preprocessing: Preprocessing) -> Geometry:
    """Follow a picture of ``height`` x ``width`` through the preprocessing.

    The rounding is CLIPImageProcessor's: the longer side is cut down to whole pixels, an odd
    margin of the crop puts the larger half below and right.

    Raises:
        BundleError: without a crop, the resized picture is not of the graph's size.
    """
    side = max(height, width)
    padded_height, padded_width = (side, side) if preprocessing.pad_to_square else (height, width)
    resized_height, resized_width = _resized_size(padded_height, padded_width, preprocessing)
    wanted = (preprocessing.height, preprocessing.width)
    if not preprocessing.center_crop and (resized_height, resized_width) != wanted:
        raise BundleError(
            f"bundle.json: preprocessing turns a picture of {width} x {height} into "
            f"{resized_width} x {resized_height}, but the graph takes {wanted[1]} x {wanted[0]} "
            'and nothing crops. Set "center_crop" or "resize": "exact" and build again.'
        )
    return Geometry(
        height=height,
        width=width,
        pad_top=(padded_height - height) // 2,
        pad_left=(padded_width - width) // 2,
        padded_height=padded_height,
        padded_width=padded_width,
        resized_height=resized_height,
        resized_width=resized_width,
        crop_top=(resized_height - preprocessing.height) // 2,
        crop_left=(resized_width - preprocessing.width) // 2,
        crop_height=preprocessing.height,
        crop_width=preprocessing.width,
    )


def _resized_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    if preprocessing.resize == "none":
        return height, width
    if preprocessing.resize == "exact":
        return preprocessing.resize_height, preprocessing.resize_width
    short = preprocessing.resize_height
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)
