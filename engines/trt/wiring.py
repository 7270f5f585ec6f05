"""The buffers of a plan, and how those of several plans that run in turn lie beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.session import Array, InputSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class DeviceTensor:
    """One input or output with its two buffers, as large as the profile allows."""

    name: str
    dtype: np.dtype[Any]
    min: Shape
    """Of an input; empty for an output."""
    opt: Shape
    """Likewise."""
    max: Shape
    device: int
    pinned: NDArray[np.uint8] | None
    """None where it is not copied to or from the host."""
    borrowed: bool = False
    """The device buffer is another stage's."""

    @property
    def most_bytes(self) -> int:
        """Size of the device buffer."""
        return int(np.prod(self.max)) * self.dtype.itemsize

    def spec(self) -> InputSpec:
        """Return what `check_inputs` compares an input with; any number of rows is taken."""
        ranges = zip(self.min[1:], self.max[1:], strict=True)
        return InputSpec(self.dtype, ("rows", *(range(low, high + 1) for low, high in ranges)))

    def view(self, shape: Shape) -> Array:
        """Return the page-locked buffer as an array of a shape."""
        if self.pinned is None:
            raise RuntimeError(f"{self.name} stays on the device")
        size = int(np.prod(shape)) * self.dtype.itemsize
        return self.pinned[:size].view(self.dtype).reshape(shape)


@dataclass(frozen=True)
class Wiring:
    """How a plan that is one of several stages lies beside the others.

    Attributes:
        stream: what all stages are queued on; None to make one.
        on_device: inputs and outputs that pass between stages and are not copied to or from the
            host.
        buffers: those of them that lie in a buffer of another stage.
    """

    stream: int | None = None
    on_device: frozenset[str] = frozenset()
    buffers: Mapping[str, DeviceTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class QueuedValue:
    """An output that is being computed.

    Attributes:
        shape: as it was queued.
        rows: how many of its rows were asked for.
    """

    shape: Shape
    rows: int
