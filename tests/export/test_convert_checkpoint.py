"""Every layout of a checkpoint becomes the same model, and a tensor is never made up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from engines.errors import CheckpointError
from export.checkpoint.convert import ConvertOptions, convert_checkpoint
from export.checkpoint.llava import open_checkpoint
from tests.tiny_language import TEMPLATE, tiny_llava, tiny_tokenizer, write_checkpoint

IDS = torch.tensor([[1, 40, 41, 4, 42, 43]])
PROJECTOR = {"linear_1": "0", "linear_2": "2"}


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return tiny_llava()


@pytest.fixture(scope="module")
def base(model: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", model)


def original_state(
    model: LlavaForConditionalGeneration,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors under LLaVA's names: (all but the tower, the tower)."""
    rest: dict[str, Tensor] = {}
    tower: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        half = tensor.half().clone()
        if name.startswith("model.vision_tower."):
            plain = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            tower[f"vision_model.{plain}"] = half
        elif name.startswith("model.multi_modal_projector."):
            _, _, layer, kind = name.split(".")
            rest[f"model.mm_projector.{PROJECTOR[layer]}.{kind}"] = half
        else:
            rest[name.replace("model.language_model.", "model.")] = half
    return rest, tower


def write_original(
    root: Path, base: Path, model: LlavaForConditionalGeneration, *, inside: bool, pickled: bool
) -> Path:
    """Write what LLaVA's own code writes, and CLIP beside it."""
    source, clip = root / "original", root / "clip"
    source.mkdir(parents=True)
    clip.mkdir()
    rest, tower = original_state(model)
    if inside:
        rest |= {f"model.vision_tower.vision_tower.{name}": one for name, one in tower.items()}
    others = {"text_model.embeddings.position_ids": torch.arange(4), "logit_scale": torch.ones(1)}
    save_file({**tower, **others}, clip / "model.safetensors")
    if pickled:
        torch.save(rest, source / "pytorch_model.bin")
    else:
        save_file(rest, source / "model.safetensors", metadata={"format": "pt"})
    text = model.config.text_config.to_dict()
    fields = {name: value for name, value in text.items() if value is not None} | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(clip),
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "square",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    (source / "config.json").write_text(json.dumps(fields))
    vision = model.config.vision_config.to_dict()
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    shutil.copy(base / "preprocessor_config.json", clip)
    tiny_tokenizer().save_pretrained(source)
    (root / "template.jinja").write_text(TEMPLATE)
    return source


def convert(source: Path, out: Path, **options: Any) -> list[str]:
    return convert_checkpoint(ConvertOptions(source, out, **options))


def logits(root: Path) -> Tensor:
    """What the whole model says, by what our exporters read of it."""
    model: Any = open_checkpoint(root).llava(dtype=torch.float32)
    pixels = torch.randn((1, 3, 28, 28), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([IDS[:, :3], torch.full((1, 16), 4), IDS[:, 4:]], dim=1)
    with torch.no_grad():
        said: Tensor = model(input_ids=ids, pixel_values=pixels).logits
        more = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=8, do_sample=False)
    return torch.cat([said.flatten(), more.flatten().float()])


@pytest.mark.parametrize("inside", [True, False], ids=["tower inside", "tower apart"])
@pytest.mark.parametrize("pickled", [True, False], ids=["pickled", "safetensors"])
def test_the_original_layout_gives_the_same_answers(
    base: Path, model: LlavaForConditionalGeneration, tmp_path: Path, inside: bool, pickled: bool
) -> None:
    source = write_original(tmp_path, base, model, inside=inside, pickled=pickled)
    with pytest.raises(CheckpointError, match=r"export\.convert_checkpoint"):
        open_checkpoint(source)
    done = convert(source, tmp_path / "out", chat_template=tmp_path / "template.jinja")
    assert torch.equal(logits(tmp_path / "out"), logits(base))
    assert ("read as pickles" in " ".join(done)) == pickled
    assert ("vision tower of" in " ".join(done)) != inside
    ours, theirs = open_checkpoint(tmp_path / "out"), open_checkpoint(base)
    assert ours.preprocessing == theirs.preprocessing
    assert ours.prompt("t.json").stop_token_ids == theirs.prompt("t.json").stop_token_ids
    assert sorted(entry.name for entry in tmp_path.iterdir() if "out" in entry.name) == ["out"]


def test_a_tokenizer_without_a_picture_token_gets_one(
    base: Path, model: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    source = write_original(tmp_path, base, model, inside=True, pickled=False)
    text = (source / "tokenizer.json").read_text().replace("<image>", "<other>")
    (source / "tokenizer.json").write_text(text)
    text = (source / "tokenizer_config.json").read_text().replace("<image>", "<other>")
    (source / "tokenizer_config.json").write_text(text)
    done = convert(source, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.prompt("t.json").image_token_id >= 260
    assert len(checkpoint.embedding_table()) > checkpoint.prompt("t.json").image_token_id
    assert "Vicuna" in " ".join(done)
    text_config: Any = checkpoint.text_config
    assert text_config.vocab_size == len(checkpoint.embedding_table())


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", ""])
def test_a_projector_alone(base: Path, tmp_path: Path, suffix: str, prefix: str) -> None:
    other = tiny_llava(seed=7)
    rest, _ = original_state(other)
    named = {
        name.replace("model.mm_projector.", prefix): one
        for name, one in rest.items()
        if "mm_projector" in name
    }
    file = tmp_path / f"mm_projector{suffix}"
    if suffix == ".bin":
        torch.save(named, file)
    else:
        save_file(named, file)
    convert(base, tmp_path / "out", projector=file)
    ours = open_checkpoint(tmp_path / "out").projector().state_dict()
    for name, tensor in other.model.multi_modal_projector.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(
        open_checkpoint(tmp_path / "out").embedding_table(), open_checkpoint(base).embedding_table()
    )


def test_a_lora_is_merged_as_peft_merges_it(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model: Any = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        exclude_modules=".*vision_tower.*",
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "lora")
    merged = adapted.merge_and_unload().state_dict()
    done = convert(base, tmp_path / "out", lora=tmp_path / "lora")
    assert "4 LoRA products" in " ".join(done)
    ours = open_checkpoint(tmp_path / "out").language_model(torch.float32).state_dict()
    theirs = {name.replace("model.language_model.", "model."): one for name, one in merged.items()}
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=2e-3), name
    changed = "model.layers.0.self_attn.q_proj.weight"
    before = open_checkpoint(base).language_model(torch.float32).state_dict()[changed]
    assert not torch.allclose(ours[changed], before, atol=2e-2)


def test_a_lora_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"

    def attempt(match: str, **tensors: Tensor) -> None:
        save_file(tensors, lora / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=match):
            convert(base, tmp_path / "out", lora=lora)
        assert not (tmp_path / "out").exists()

    a, b = torch.zeros(2, 64), torch.zeros(64, 2)
    attempt("both lora_A and lora_B", **{name.format(0, "A"): a})
    attempt("tensors that it has not", **{name.format(9, "A"): a, name.format(9, "B"): b})
    attempt(
        "of different models", **{name.format(0, "A"): a, name.format(0, "B"): torch.zeros(9, 2)}
    )
    attempt(
        "has not the rank 2",
        **{name.format(0, "A"): torch.zeros(3, 64), name.format(0, "B"): torch.zeros(64, 3)},
    )
    attempt("is not half of a LoRA product", **{"base_model.model.lm_head.weight": a})
    (lora / "adapter_config.json").write_text(
        json.dumps({"r": 2, "lora_alpha": 4, "use_dora": True})
    )
    attempt("use_dora is not what plain LoRA has", **{name.format(0, "A"): a})


class _Runs:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {os.environ['FOVEATE_TEST_PROOF']}",)


def test_a_pickle_never_runs(
    base: Path,
    model: LlavaForConditionalGeneration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proof = tmp_path / "proof"
    monkeypatch.setenv("FOVEATE_TEST_PROOF", str(proof))
    source = write_original(tmp_path, base, model, inside=True, pickled=True)
    torch.save({"model.norm.weight": _Runs()}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read without running its code"):
        convert(source, tmp_path / "out", chat_template=tmp_path / "template.jinja")
    assert not proof.exists()
    assert not (tmp_path / "out").exists()
    torch.save({"weights": [1, 2]}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="something else than a dictionary of tensors"):
        convert(source, tmp_path / "out", chat_template=tmp_path / "template.jinja")


def test_a_tensor_that_is_missing_is_never_made_up(
    base: Path, model: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    source = write_original(tmp_path, base, model, inside=True, pickled=False)
    state = load_file(source / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        convert(source, tmp_path / "out", chat_template=tmp_path / "template.jinja")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_did(base: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "export.convert_checkpoint", str(base), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "tensors of 1 files written as safetensors" in done.stdout
    assert "Next: python -m export.build" in done.stdout
    assert torch.equal(logits(tmp_path / "out"), logits(base))
