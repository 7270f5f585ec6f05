"""The interface of every engine: named arrays in, named arrays out.

ONNX Runtime (`engines.ort`), TensorRT and OpenVINO implement it over the same ONNX file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

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
