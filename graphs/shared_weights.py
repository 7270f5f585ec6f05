"""Store the large weights of several graphs in one file, equal bytes once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

DIGEST_KEY = "foveate.weights_sha256"
"""Metadata of a graph: digest of its weights here. Who sees only the graph (the sidecar of a
TensorRT plan) still notices other weights."""

_LEAST_BYTES = 4096
"""Smaller tensors stay in the graph; TensorRT and ONNX Runtime read shapes and axes from there."""
_PAGE_BYTES = 4096
"""Every tensor begins on a page, so that ONNX Runtime can map the file instead of reading it."""


class SharedWeights:
    """A file of weights that graphs beside it point into.

    Attributes:
        file: where; it is replaced.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._offsets: dict[bytes, int] = {}
        self._end = 0

    def place(self, model: ir.Model) -> None:
        """Move the weights of a graph, which is to be written to the same folder, into the file."""
        whole = hashlib.sha256()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab" if self._end else "wb") as stream:
            for name, value in sorted(model.graph.initializers.items()):
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _LEAST_BYTES:
                    continue
                data = tensor.tobytes()
                digest = hashlib.sha256(data).digest()
                whole.update(name.encode() + digest)
                if digest not in self._offsets:
                    stream.write(bytes(-self._end % _PAGE_BYTES))
                    self._offsets[digest] = stream.tell()
                    stream.write(data)
                    self._end = stream.tell()
                value.const_value = ir.ExternalTensor(
                    self.file.name,
                    self._offsets[digest],
                    len(data),
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=name,
                    base_dir=self.file.parent,
                )
        model.metadata_props[DIGEST_KEY] = whole.hexdigest()
