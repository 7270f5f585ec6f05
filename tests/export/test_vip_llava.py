"""Features of several tower layers, as ViP-LLaVA reads them: tokens, answers, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from engines.bundle import Bundle, open_bundle
from engines.errors import CheckpointError, OptionError
from export.build import BuildOptions, build_bundle
from export.build.command import main
from export.checkpoint.llava import open_checkpoint
from export.language.language_models import DecoderOptions
from export.language.served_model import write_served_model
from export.reducers import make_reducer
from export.towers import Scoring
from export.towers.registry import make_tower
from export.tune.features import reduce_pictures
from export.verify import VerifyOptions, verify_bundles
from export.verify.reference import observe_tower
from export.vision.vision_module import build_vision_module
from runtime.commands.ask import ask
from runtime.language.generate import GenerationOptions
from runtime.language.prompt import Turn
from runtime.model import open_model
from runtime.model_options import ModelOptions
from runtime.vision import VisionEncoder
from tests.export.conftest import transformers_4_name
from tests.photographs import clip_pixels, load_photographs
from tests.tiny_language import SPECIAL, rounded, tiny_llava, write_checkpoint

QUESTION = "What is in the picture?"
SIDE, PATCHES = 28, 16
LAYERS = [-2, 1, 2]
"""Of four; the deepest is 3, and they are not in order."""


def tiny(config: Any = VipLlavaConfig, layers: Any = LAYERS) -> Any:
    """A model whose projector reads several layers, in numbers that float16 holds exactly."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=7,
        projection_dim=32,
        initializer_factor=3.0,
    )
    fields = {
        "vision_config": vision,
        "text_config": tiny_llava().config.text_config,
        "image_token_index": SPECIAL.index("<image>"),
        "image_seq_length": PATCHES,
        "vision_feature_layer": layers,
        "tie_word_embeddings": False,
    }
    made = {
        VipLlavaConfig: VipLlavaForConditionalGeneration,
        LlavaConfig: LlavaForConditionalGeneration,
    }[config]
    return rounded(made(config(**fields)))


@torch.no_grad()
def tokens_of(model: Any, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What transformers gives the language model, float32[B, P, D]."""
    seen = model.get_image_features(torch.from_numpy(pixels)).pooler_output
    return torch.stack(tuple(seen)).numpy()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vip") / "tiny-vip", tiny())


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> VipLlavaForConditionalGeneration:
    return VipLlavaForConditionalGeneration.from_pretrained(checkpoint, dtype="float32").eval()


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One tower with all tokens and with 6."""
    out = tmp_path_factory.mktemp("bundles") / "vip"
    build_bundle(
        BuildOptions(
            str(checkpoint), out, tokens=("all", 6), decoders=DecoderOptions(precision="fp32")
        )
    )
    return open_bundle(out)


def test_pixels_and_all_tokens_are_those_of_transformers(checkpoint, reference, bundle) -> None:
    picture = load_photographs()["astronaut.png"]
    fields = json.loads((checkpoint / "preprocessor_config.json").read_text())
    processor: Any = CLIPImageProcessor(**fields)
    given = processor(images=Image.fromarray(picture), return_tensors="np")["pixel_values"]
    with VisionEncoder(bundle, threads=1) as encoder:
        pixels = encoder.layout.pixel_values([picture], encoder._bands)
        seen = encoder.encode([picture])
    np.testing.assert_allclose(pixels, given, atol=1e-5)
    np.testing.assert_allclose(seen.tokens_of(0), tokens_of(reference, given)[0], atol=1e-4)


def test_the_greedy_answer_is_that_of_transformers(reference, bundle) -> None:
    picture = load_photographs()["coffee.png"]
    with open_model(bundle, threads=1) as model:
        answer = model.ask(picture, QUESTION, GenerationOptions(max_tokens=16))
        ids = model.writer.ids([Turn("user", QUESTION, images=1)]).tolist()
        pixels = model.encoder.layout.pixel_values([picture], model.encoder._bands)
    image = reference.config.image_token_id
    at = ids.index(image)
    ids = [*ids[:at], *[image] * PATCHES, *ids[at + 1 :]]
    with torch.no_grad():
        written = reference.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=torch.from_numpy(pixels),
            max_new_tokens=len(answer.token_ids),
            do_sample=False,
        )
    assert len(answer.token_ids) > 4
    assert written[0, len(ids) :].tolist() == list(answer.token_ids)


@pytest.mark.parametrize("layers", [LAYERS, -2])
@pytest.mark.parametrize("config", [VipLlavaConfig, LlavaConfig])
def test_any_kind_may_read_several_layers(tmp_path, config, layers) -> None:
    model = tiny(config, layers)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "llava", model))
    pixels = clip_pixels(SIDE)[:2]
    with torch.no_grad():
        tokens, *_ = build_vision_module(checkpoint, make_reducer("none"))(torch.from_numpy(pixels))
    np.testing.assert_allclose(tokens.numpy(), tokens_of(model, pixels), atol=1e-4)


@pytest.mark.parametrize("scoring", Scoring)
def test_scores_are_those_of_the_deepest_layer(checkpoint, scoring) -> None:
    model: Any = open_checkpoint(checkpoint).vision_model()
    model.set_attn_implementation("eager")
    images = torch.from_numpy(clip_pixels(SIDE)[:2])
    with torch.no_grad():
        several = make_tower(model, (2, 3, 1), scoring)(images)
        each = [make_tower(model, (layer,), scoring)(images) for layer in (2, 3, 1)]
        expected, _ = observe_tower(model, (2, 3, 1), scoring, images)
    torch.testing.assert_close(several.features, torch.cat([one.features for one in each], dim=-1))
    torch.testing.assert_close(
        several.class_token, torch.cat([one.class_token for one in each], dim=-1)
    )
    torch.testing.assert_close(several.scores, each[1].scores)
    torch.testing.assert_close(several.keys, each[1].keys)
    for name in ("features", "class_token", "scores", "keys"):
        torch.testing.assert_close(getattr(several, name), getattr(expected, name))


def test_fewer_tokens_are_answered_and_verified(bundle, checkpoint, photographs) -> None:
    answer = ask(
        bundle.root,
        photographs / "coffee.png",
        QUESTION,
        model=ModelOptions(visual_tokens=6),
        generation=GenerationOptions(max_tokens=3),
    )
    assert answer.token_ids
    for tokens in (6, PATCHES):
        report = verify_bundles(
            VerifyOptions(
                bundles=(bundle.root,),
                model=str(checkpoint),
                images=photographs,
                engines=("ort",),
                tokens=tokens,
                max_tokens=4,
                threads=1,
            )
        )
        (candidate,) = report.candidates
        assert report.passed, candidate.failures
        assert candidate.summary["absolute"] <= 1e-4
        assert candidate.summary["overlap"] == candidate.summary["equal_answers"] == 1.0


@pytest.mark.parametrize("naming", ["transformers-4", "transformers-5"])
def test_files_of_each_release_hold_the_same_model(checkpoint, reference, tmp_path, naming) -> None:
    root = tmp_path / "named"
    root.mkdir()
    for file in checkpoint.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    if naming == "transformers-4":
        state = {transformers_4_name(name): tensor for name, tensor in state.items()}
        config = json.loads((root / "config.json").read_text())
        config["vision_feature_layers"] = config.pop("vision_feature_layer")
        (root / "config.json").write_text(json.dumps(config))
    save_file(state, root / "model.safetensors", metadata={"format": "pt"})
    opened = open_checkpoint(root)
    assert opened.feature_layers == (3, 1, 2)
    assert opened.feature_width == 96
    assert not opened.keeps_class_token
    for name, tensor in opened.projector().state_dict().items():
        assert torch.equal(tensor, reference.model.multi_modal_projector.state_dict()[name]), name
    pixels = clip_pixels(SIDE)[:1]
    with torch.no_grad():
        tokens, *_ = build_vision_module(opened, make_reducer("none"))(torch.from_numpy(pixels))
    np.testing.assert_allclose(tokens.numpy(), tokens_of(reference, pixels), atol=1e-4)


def test_a_projector_of_another_width_is_refused(checkpoint, tmp_path) -> None:
    root = tmp_path / "other"
    root.mkdir()
    for file in checkpoint.iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    config = json.loads((root / "config.json").read_text())
    config["vision_feature_layer"] = [-2, 1]
    (root / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"linear_1\.weight is \[64, 96\], expected \[64, 64"):
        open_checkpoint(root).projector()


def test_the_class_token_is_dropped_whatever_is_asked(checkpoint) -> None:
    with pytest.raises(OptionError, match=r"class_token is True, but .* is 'default'"):
        build_vision_module(open_checkpoint(checkpoint), make_reducer("none", class_token=True))


def test_a_server_for_llava_next_refuses_it(checkpoint, tmp_path) -> None:
    told = r"linear_1, linear_2, projector_layernorm and reads features of 3 layers.*--server vllm"
    with pytest.raises(CheckpointError, match=told):
        write_served_model(open_checkpoint(checkpoint), tmp_path / "llm", "trtllm")
    write_served_model(open_checkpoint(checkpoint), tmp_path / "vllm", "vllm")
    assert load_file(next((tmp_path / "vllm").glob("*.safetensors")))


def test_what_is_tuned_on_has_the_width_of_all_layers(checkpoint, photographs, tmp_path) -> None:
    reduced = reduce_pictures(
        open_checkpoint(checkpoint),
        make_reducer("visionzip", dominant=4, contextual=2),
        photographs,
        ["coffee.png", "chelsea.png"],
        tmp_path,
        lambda rows, _: rows,
    )
    assert reduced.tokens.shape == (2, 6, 96)
    assert reduced.valid.tolist() == [6, 6]


def test_a_dry_run_tells_the_plan(checkpoint, tmp_path, capsys) -> None:
    main(options=BuildOptions(str(checkpoint), tmp_path / "out", tokens=(6,)), dry_run=True)
    assert "6 of 16 visual tokens" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
