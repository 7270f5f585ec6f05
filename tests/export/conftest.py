"""A LLaVA checkpoint of a few thousand random weights, in each naming that is in the wild."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from export.build import build_bundle
from export.build.plan import BuildOptions
from export.language.language_models import DecoderOptions
from tests.photographs import load_photographs
from tests.verified_bundles import put_prumerge, rewrite_bundle

IMAGE_SIZE, PATCH = 56, 7  # 64 patches
WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "USER:", "ASSISTANT:", "what", "is", "this"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }} {% endfor %}{% endfor %}"
)


def tiny_text() -> LlamaConfig:
    """The language model of checkpoints that are made for a test."""
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )


def tiny_llava(seed: int = 0, layer: int = -2) -> LlavaForConditionalGeneration:
    """A LLaVA whose attention is far from uniform, as a trained one's is."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=64,
        initializer_factor=3.0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=tiny_text(),
        image_token_index=WORDS.index("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=layer,
    )
    return LlavaForConditionalGeneration(config).eval()


def transformers_4_name(name: str) -> str:
    for new, old in (
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new).removeprefix("vision_model.")
    raise ValueError(name)


def write_checkpoint(
    root: Path, model: LlavaForConditionalGeneration, naming: str = "saved", shards: int = 1
) -> Path:
    """Write a checkpoint with `naming` "transformers-4", "transformers-5" or "saved"."""
    model.save_pretrained(root)
    if naming != "saved" or shards > 1:
        state = load_file(root / "model.safetensors") if naming == "saved" else model.state_dict()
        if naming == "transformers-4":
            state = {transformers_4_name(name): tensor for name, tensor in state.items()}
        _write_shards(root, {k: v.clone() for k, v in state.items()}, shards)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (root / "preprocessor_config.json").write_text(json.dumps(processor))
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    ).save_pretrained(root)
    (root / "chat_template.jinja").write_text(TEMPLATE)
    return root


def _write_shards(root: Path, state: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(state, root / "model.safetensors", metadata={"format": "pt"})
        return
    (root / "model.safetensors").unlink()
    weight_map = {}
    names = sorted(state)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = {name: state[name] for name in names[number::shards]}
        save_file(mine, root / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def tiny_model() -> LlavaForConditionalGeneration:
    return tiny_llava()


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: LlavaForConditionalGeneration
) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-llava", tiny_model)


@pytest.fixture
def make_checkpoint(
    tmp_path: Path, tiny_model: LlavaForConditionalGeneration
) -> Callable[..., Path]:
    """A fresh copy that a test may damage."""

    def make(naming: str = "saved", shards: int = 1) -> Path:
        return write_checkpoint(tmp_path / "checkpoint", tiny_model, naming, shards)

    return make


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four photographs and a file that is none."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
        pixels = load_photographs()[name]
        Image.fromarray(pixels).save(folder / f"{Path(name).stem}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="session")
def verified_bundle(language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A faithful fp32 bundle with a graph of 8 visual tokens and one of all 16."""
    out = tmp_path_factory.mktemp("verified") / "bundle"
    build_bundle(
        BuildOptions(
            str(language_checkpoint),
            out,
            tokens=(8, "all"),
            decoders=DecoderOptions(precision="fp32"),
        )
    )
    return out


@pytest.fixture(scope="session")
def prumerge_bundle(
    verified_bundle: Path, language_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same bundle with a graph of PruMerge instead of the others."""
    change = put_prumerge(verified_bundle, language_checkpoint)
    return rewrite_bundle(verified_bundle, tmp_path_factory.mktemp("prumerge") / "bundle", change)
