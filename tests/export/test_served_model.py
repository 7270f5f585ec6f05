"""The language model as a server takes it: whole, readable, and the same model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    SiglipVisionConfig,
)
from typer.testing import CliRunner

from engines.cli import make_app
from engines.errors import CheckpointError, OptionError
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


def test_what_is_no_server_is_told(language_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--server ollama: expected one of vllm, trtllm"):
        write_served_model(open_checkpoint(language_checkpoint), tmp_path / "llm", "ollama")


@pytest.fixture(scope="module")
def llava_next(language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("next") / "llm"
    done = CliRunner().invoke(
        make_app(main), [str(language_checkpoint), str(out), "--server", "trtllm", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["serve"] == (
        f"trtllm-serve {out} --extra_llm_api_options {out}/trtllm_options.yaml"
    )
    return out


def test_for_tensorrt_llm_it_is_a_llava_next_of_the_same_weights(
    llava_next: Path, language_reference: LlavaForConditionalGeneration
) -> None:
    served, told = LlavaNextForConditionalGeneration.from_pretrained(
        llava_next, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    with torch.no_grad():
        found, expected = served.eval()(input_ids=IDS).logits, language_reference(IDS).logits
    torch.testing.assert_close(found, expected)
    ours, theirs = language_reference.state_dict(), served.state_dict()
    assert set(theirs) - set(ours) == {"model.image_newline"}
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor)


def test_for_tensorrt_llm_names_are_those_of_the_hub(llava_next: Path) -> None:
    """TensorRT-LLM reads them by these prefixes, and needs the index."""
    index = json.loads((llava_next / "model.safetensors.index.json").read_text())
    names = list(index["weight_map"])
    assert "image_newline" in names and "language_model.lm_head.weight" in names
    assert "language_model.model.embed_tokens.weight" in names
    assert "multi_modal_projector.linear_1.weight" in names
    assert any(name.startswith("vision_tower.vision_model.encoder.layers.0.") for name in names)
    config = json.loads((llava_next / "config.json").read_text())
    assert config["model_type"] == "llava_next"
    assert config["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert config["image_token_index"] == 4


def test_for_tensorrt_llm_the_processor_opens_and_hands_the_prompt_on(llava_next: Path) -> None:
    processor = AutoProcessor.from_pretrained(llava_next)
    assert type(processor).__name__ == "LlavaNextProcessor"
    tokenizer = AutoTokenizer.from_pretrained(llava_next)
    prompt = "<s>USER: <image>\nWhat? ASSISTANT:"
    parts = [{"type": "text", "text": prompt}, {"type": "image"}]
    for content in (prompt, parts):
        messages = [{"role": "user", "content": content}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt


def test_tensorrt_llm_takes_clip_only(language_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(language_checkpoint)
    other = replace(checkpoint, vision_config=SiglipVisionConfig())
    with pytest.raises(CheckpointError, match=r"'siglip_vision_model'.*--server vllm"):
        write_served_model(other, tmp_path / "llm", "trtllm")
    assert not (tmp_path / "llm").exists()
