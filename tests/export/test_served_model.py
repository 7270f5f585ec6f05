"""The language model as a server takes it: whole, readable, and the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration
from typer.testing import CliRunner

from engines.cli import make_app
from engines.errors import OptionError
from export.checkpoint.llava import open_checkpoint
from export.language.served_model import main, write_served_model

IDS = torch.arange(5, 40)[None]


def test_it_is_the_checkpoint_s_language_model(
    language_checkpoint: Path, language_reference: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    done = CliRunner().invoke(
        make_app(main), [str(language_checkpoint), str(tmp_path / "llm"), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["serve"].startswith(f"vllm serve {tmp_path / 'llm'} --enable-")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.float32).eval()
    with torch.no_grad():
        found, expected = served(IDS).logits, language_reference(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)
    template = AutoTokenizer.from_pretrained(tmp_path / "llm").chat_template
    assert template == open_checkpoint(language_checkpoint).chat_template()
    assert {file.stat().st_mode & 0o044 for file in (tmp_path / "llm").iterdir()} == {0o044}


def test_what_is_there_is_kept(language_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OptionError, match="is already there"):
        write_served_model(open_checkpoint(language_checkpoint), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
