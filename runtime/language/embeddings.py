"""Read rows of the bundle's text embedding table from disk.

The file is mapped, not loaded, so only the rows that a conversation uses take memory, and every
backend sees the same numbers.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from engines.bundle import Bundle
from engines.errors import BundleError
from runtime.language.parts import Embeddings, TokenIds

TENSOR_NAME = "embed_tokens"
_MAX_HEADER_BYTES = 1 << 20


class EmbeddingTable:
    """float16[V, D] on disk, float32 rows in use.

    Attributes:
        vocabulary: V, how many token ids there are.
        hidden_size: D.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Map the table of an opened bundle.

        Raises:
            BundleError: the file does not hold the table that the manifest describes.
        """
        text = bundle.manifest.text
        self.vocabulary = text.vocabulary
        self.hidden_size = text.hidden_size
        file = self._file = bundle.path(text.embeddings)
        offset = _tensor_offset(file, [text.vocabulary, text.hidden_size])
        self._rows: np.ndarray[Any, np.dtype[np.float16]] = np.memmap(
            file, "<f2", "r", offset, (text.vocabulary, text.hidden_size)
        )

    def rows(self, ids: TokenIds) -> Embeddings:
        """Return the rows of token ids, float32[N, D].

        Raises:
            BundleError: an id is outside the vocabulary, so the tokenizer is of another model; or
                a row holds a number that is none.
        """
        outside = ids[(ids < 0) | (ids >= self.vocabulary)]
        if outside.size:
            raise BundleError(
                f"Token id {outside[0]} has no row in the embedding table, which has "
                f"{self.vocabulary}. The bundle's tokenizer.json does not belong to its language "
                "model; build the bundle again from one checkpoint."
            )
        rows = self._rows[ids].astype(np.float32)  # [N, D]
        if not np.isfinite(rows).all():
            raise BundleError(
                f"The embedding table {self._file} holds numbers that are not finite. Build the "
                "bundle again from an undamaged checkpoint."
            )
        return rows


def _tensor_offset(file: Path, shape: list[int]) -> int:
    """Return where the table's numbers begin in a safetensors file."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(stream.read(length))
        tensor = header[TENSOR_NAME]
        found = {"dtype": tensor["dtype"], "shape": tensor["shape"]}
        begin, end = tensor["data_offsets"]
        if type(begin) is not int or type(end) is not int or begin < 0:
            raise ValueError(f"its data_offsets are {tensor['data_offsets']!r:.80}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise BundleError(
            f"{file} is not a safetensors file with one tensor {TENSOR_NAME!r} "
            f"({type(error).__name__}: {error}). Build the bundle again with "
            "`python -m export.build`."
        ) from error
    expected = {"dtype": "F16", "shape": shape}
    held_bytes = file.stat().st_size - 8 - length
    if found != expected or end - begin != 2 * shape[0] * shape[1] or held_bytes < end:
        raise BundleError(
            f"{file}: {TENSOR_NAME} is {found} in {held_bytes} bytes, and bundle.json expects "
            f"{expected}. Build the bundle again with `python -m export.build`."
        )
    return 8 + int(length) + int(begin)
