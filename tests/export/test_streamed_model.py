"""A language model whose layers are read as they run says what the whole one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint.llava import open_checkpoint
from export.language.streamed_model import stream_language_model
from export.verify import reference
from export.verify.reference import LanguageReference
from tests.tiny_language import tiny_llava, write_checkpoint

IDS = np.random.default_rng(1).integers(5, 300, 12)


@pytest.mark.parametrize(
    ("family", "changes"), [("qwen3", {"tie_word_embeddings": True}), ("llama", {})]
)
def test_it_says_what_the_whole_one_says(
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = write_checkpoint(tmp_path / "checkpoint", tiny_llava(family, **changes))
    checkpoint = open_checkpoint(root)
    logits, ids = LanguageReference(checkpoint).answer([IDS], 4, ())
    monkeypatch.setattr(reference, "read_free_memory", lambda: 1000)
    streamed, streamed_ids = LanguageReference(checkpoint).answer([IDS], 4, ())
    np.testing.assert_array_equal(streamed, logits)
    assert streamed_ids == ids
    assert "layer by layer" in caplog.text


def test_a_layer_is_empty_before_and_after_it_runs(language_checkpoint: Path) -> None:
    model: Any = stream_language_model(open_checkpoint(language_checkpoint))
    layer = model.model.layers[0]
    for _ in range(2):
        assert all(weight.is_meta for weight in layer.parameters())
        with torch.no_grad():
            model(torch.from_numpy(IDS[None]))
