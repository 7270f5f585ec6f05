"""The embedding table: what is on disk is checked before a row is read."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.errors import BundleError
from runtime.language.embeddings import EmbeddingTable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 64, "its header claims"),
        (b"\x02" + b"\x00" * 7 + b"{}", "KeyError: 'embed_tokens'"),
        (None, "No such file"),
    ],
)
def test_a_damaged_embedding_table_is_explained(
    language_bundle: Bundle, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / language_bundle.manifest.text.embeddings
    file.parent.mkdir(parents=True)
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BundleError, match=message):
        EmbeddingTable(replace(language_bundle, root=tmp_path))


def test_an_embedding_table_of_another_model_is_refused(language_bundle: Bundle) -> None:
    text = language_bundle.manifest.text.model_copy(update={"hidden_size": 128})
    manifest = language_bundle.manifest.model_copy(update={"text": text})
    with pytest.raises(BundleError, match=r"'shape': \[304, 64\].*bundle.json expects"):
        EmbeddingTable(replace(language_bundle, manifest=manifest))


def copied(bundle: Bundle, tmp_path: Path) -> tuple[Bundle, Path]:
    file = tmp_path / bundle.manifest.text.embeddings
    file.parent.mkdir(parents=True)
    file.write_bytes(bundle.path(bundle.manifest.text.embeddings).read_bytes())
    return replace(bundle, root=tmp_path), file


@pytest.mark.parametrize("offsets", [[-8, 38904], None, ["0", 38912], [True, 38913], [0.0, 38912]])
def test_hostile_offsets_are_refused(
    language_bundle: Bundle, tmp_path: Path, offsets: object
) -> None:
    bundle, file = copied(language_bundle, tmp_path)
    tensor = {"dtype": "F16", "shape": [304, 64], "data_offsets": offsets}
    header = json.dumps({"embed_tokens": tensor}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(304 * 64 * 2))
    with pytest.raises(BundleError, match="not a safetensors file"):
        EmbeddingTable(bundle)


def test_a_header_of_many_levels_is_refused(language_bundle: Bundle, tmp_path: Path) -> None:
    bundle, file = copied(language_bundle, tmp_path)
    header = b"[" * 100_000
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(BundleError, match="not a safetensors file"):
        EmbeddingTable(bundle)


def test_rows_that_are_not_finite_are_refused(language_bundle: Bundle, tmp_path: Path) -> None:
    bundle, file = copied(language_bundle, tmp_path)
    content = bytearray(file.read_bytes())
    content[-2:] = b"\x00\x7e"  # NaN in float16
    file.write_bytes(content)
    table = EmbeddingTable(bundle)
    table.rows(np.array([0, 302], np.int64))
    with pytest.raises(BundleError, match="not finite"):
        table.rows(np.array([303], np.int64))
