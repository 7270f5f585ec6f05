"""The batch sizes of a plan and the input shapes that follow (TensorRT's optimisation profile)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.errors import OptionError
from engines.manifest import TOKENS_AXIS, TensorSpec
from engines.trt.plan import ShapeRange


@dataclass(frozen=True)
class BatchRange:
    """Sizes of an axis that a plan takes, most often the batch; it is optimised for `opt`."""

    min: int = 1
    opt: int = 1
    max: int = 1


ONE_IMAGE = BatchRange()
"""The default. A fixed size lets TensorRT fuse bias and activation into the matrix products, which
1/1/8 does not (docs/tensorrt.md)."""


def usual_batch(most_squares: int) -> BatchRange:
    """Return the sizes of a plan that nobody said: of one picture.

    Args:
        most_squares: that one picture becomes, `Bundle.most_squares`; fewer are one run, too.
    """
    return ONE_IMAGE if most_squares == 1 else BatchRange(1, most_squares, most_squares)


def parse_batch(text: str) -> BatchRange:
    """Read `--batch`: "4" for that size alone, "1/2/8" for min/opt/max.

    Raises:
        OptionError: not one or three growing positive numbers.
    """
    parts = text.split("/")
    if len(parts) in (1, 3) and all(part.isascii() and part.isdigit() for part in parts):
        sizes = [int(part) for part in parts] * (3 if len(parts) == 1 else 1)
        if 0 < sizes[0] <= sizes[1] <= sizes[2]:
            return BatchRange(*sizes)
    raise OptionError(
        f'--batch "{text}": expected one size (4) or min/opt/max (1/1/8), each 1 or '
        "more and none smaller than the one before."
    )


def token_range(counts: Sequence[int]) -> BatchRange:
    """Return the numbers of visual tokens that a projector takes; it is optimised for the first."""
    return BatchRange(min(counts), counts[0], max(counts))


def shape_ranges(
    inputs: tuple[TensorSpec, ...], batch: BatchRange, tokens: BatchRange = ONE_IMAGE
) -> dict[str, ShapeRange]:
    """Return the optimisation profile.

    Args:
        inputs: of the graph. The axis `TOKENS_AXIS` takes ``tokens``, every other named one
            ``batch``.
        batch: sizes of the batch.
        tokens: numbers of visual tokens.

    Raises:
        OptionError: the graph's batch is fixed and another one was asked for.
    """

    def sized(spec: TensorSpec, size: int, count: int) -> tuple[int, ...]:
        sizes = {axis: count if axis == TOKENS_AXIS else size for axis in spec.shape}
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)

    for spec in inputs:
        fixed = all(isinstance(axis, int) for axis in spec.shape)
        if fixed and batch != ONE_IMAGE and spec.shape[:1] != (batch.opt,):
            raise OptionError(
                f"--batch {batch.min}/{batch.opt}/{batch.max}: the graph's input "
                f"{spec.name} has the fixed shape {list(spec.shape)}. Leave --batch out, or "
                "export with a dynamic batch."
            )
    return {
        spec.name: ShapeRange(
            min=sized(spec, batch.min, tokens.min),
            opt=sized(spec, batch.opt, tokens.opt),
            max=sized(spec, batch.max, tokens.max),
        )
        for spec in inputs
    }
