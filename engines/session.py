"""The interface of every engine: named arrays in, named arrays out.

ONNX Runtime (`engines.ort`), TensorRT and OpenVINO implement it over the same ONNX file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.errors import EngineError

Array = NDArray[Any]


class Session(Protocol):
    """A loaded graph that owns its buffers; use it as a context manager."""

    @property
    def provider(self) -> str:
        """What runs the graph, for example ``"CPUExecutionProvider"``."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names `run` takes."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names `run` returns."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, np.ndarray[Any, Any]]:
        """Run the graph once; the arrays returned belong to the caller.

        Raises:
            EngineError: a name, shape or dtype is not what the graph takes.
        """

    def close(self) -> None:
        """Free the graph and its buffers; calling it again does nothing."""

    def __enter__(self) -> Session: ...

    def __exit__(self, *_: object) -> None: ...


class Stage(Session, Protocol):
    """A session that can be one of several that run one after the other on the same device.

    What passes between is of the engine's own kind, and lies where the engine computes.
    """

    @property
    def most_rows(self) -> int | None:
        """The most rows it takes at once; None for any number."""

    def advance(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run on arrays or on what another stage returned, and hand on.

        What is returned is valid until the stage runs again.

        Raises:
            EngineError: a name, shape or dtype is not what the graph takes, or the run failed.
        """

    def fetch(self, values: Mapping[str, Any]) -> dict[str, Array]:
        """Return as arrays of the caller's what `advance` returned."""


@dataclass(frozen=True)
class InputSpec:
    """What a graph takes as one input.

    Attributes:
        dtype: NumPy's, or the engine's own name where NumPy has none.
        axes: each a size, a range of sizes, a name (one size in all inputs), or None for any size.
    """

    dtype: np.dtype[Any] | str
    axes: tuple[int | range | str | None, ...]

    def __str__(self) -> str:
        axes = ("any" if axis is None else _range_text(axis) for axis in self.axes)
        return f"{self.dtype}[{', '.join(axes)}]"

    def fits(self, array: Array, sizes: dict[str, int]) -> bool:
        """Tell whether an array fits; ``sizes`` of named axes are read and added to."""
        if str(array.dtype) != str(self.dtype) or array.ndim != len(self.axes) or 0 in array.shape:
            return False
        return all(
            size in axis
            if isinstance(axis, range)
            else (sizes.setdefault(axis, size) if isinstance(axis, str) else axis) in (size, None)
            for axis, size in zip(self.axes, array.shape, strict=True)
        )


def check_inputs(
    graph: object, wanted: Mapping[str, InputSpec], inputs: Mapping[str, Array]
) -> dict[str, int]:
    """Compare arrays with what a graph takes and return the size of every named axis.

    Args:
        graph: what the error calls it, such as its path.
        wanted: what the graph takes, by name.
        inputs: the arrays.

    Raises:
        EngineError: names, shapes or dtypes differ; all of the problems are named together.
    """
    sizes: dict[str, int] = {}
    problems = [f'"{name}" is missing' for name in wanted if name not in inputs]
    problems += [f'"{name}" is not an input' for name in inputs if name not in wanted]
    for name, spec in wanted.items():
        if name in inputs and not spec.fits(inputs[name], sizes):
            array = inputs[name]
            problems.append(f'"{name}" is {array.dtype}{list(array.shape)}, expected {spec}')
    if problems:
        raise EngineError(
            f"{graph} cannot be run on these inputs: {'; '.join(problems)}. It takes "
            f"{', '.join(wanted)}."
        )
    return sizes


def _range_text(axis: int | range | str) -> str:
    if not isinstance(axis, range):
        return str(axis)
    return str(axis[0]) if len(axis) == 1 else f"{axis[0]} to {axis[-1]}"
