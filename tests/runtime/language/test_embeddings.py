"""The embedding table: what is on disk is checked before a row is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
