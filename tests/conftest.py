"""Checkpoints and bundles that many tests read and none may change."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration

from engines.bundle import Bundle
from tests.tiny_language import tiny_llava, write_checkpoint, write_language_bundle


@pytest.fixture(scope="session")
def language_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA checkpoint whose language model has a real tokenizer and chat template."""
    return write_checkpoint(tmp_path_factory.mktemp("language") / "tiny-llama", tiny_llava())


@pytest.fixture(scope="session")
def language_reference(language_checkpoint: Path) -> LlavaForConditionalGeneration:
    """The same checkpoint as transformers runs it, in float32."""
    return LlavaForConditionalGeneration.from_pretrained(
        language_checkpoint, dtype="float32"
    ).eval()


@pytest.fixture(scope="session")
def language_bundle(language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same checkpoint's language half as an fp32 bundle; its vision graph is a stand-in."""
    return write_language_bundle(tmp_path_factory.mktemp("bundle") / "tiny", language_checkpoint)
