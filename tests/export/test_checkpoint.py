from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from engines.errors import CheckpointError
from engines.termination import end_in_order
from export.checkpoint import download as checkpoint_module
from export.checkpoint import weights as weights_module
from export.checkpoint.llava import open_checkpoint
from export.checkpoint.weights import Part

Make = Callable[..., Path]


def edit_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("naming", ["transformers-4", "transformers-5", "saved"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_naming_gives_the_same_weights(
    make_checkpoint: Make, tiny_model: LlavaForConditionalGeneration, naming: str, shards: int
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(naming, shards))
    vision = checkpoint.vision_model().state_dict()
    for name, tensor in tiny_model.model.vision_tower.state_dict().items():
        assert torch.equal(vision[name], tensor), name
    projector = checkpoint.projector().state_dict()
    for name, tensor in tiny_model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(projector[name], tensor), name
    language = checkpoint.language_model()
    ids = torch.tensor([[1, 5, 7, 8]])
    with torch.no_grad():
        expected = tiny_model(input_ids=ids).logits
        assert torch.allclose(language(input_ids=ids).logits, expected, atol=1e-6)
    assert torch.equal(
        checkpoint.embedding_table(), tiny_model.get_input_embeddings().weight.detach()
    )


def test_describes_itself(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    assert checkpoint.name == "tiny-llava"
    assert checkpoint.feature_layers == (3,)  # -2 of four layers
    assert not checkpoint.keeps_class_token
    picture = checkpoint.preprocessing
    assert (picture.resize, picture.resize_height, picture.resample) == (
        "shortest_edge",
        56,
        "bicubic",
    )
    assert picture.center_crop
    assert picture.mean == (0.48, 0.46, 0.41)
    prompt = checkpoint.prompt("tokenizer.json")
    assert (prompt.image_token, prompt.image_token_id) == ("<image>", 4)
    assert prompt.stop_token_ids == (2,)
    assert not prompt.add_bos_token
    assert checkpoint.tokenizer_files()[0].name == "tokenizer.json"


@pytest.mark.parametrize(("written", "read"), [(80, 80), (None, None)])
def test_the_longest_answer_is_read_from_the_generation_config(
    make_checkpoint: Make, written: int | None, read: int | None
) -> None:
    root = make_checkpoint("transformers-5", 1)
    (root / "generation_config.json").write_text(json.dumps({"max_new_tokens": written}))
    assert open_checkpoint(root).prompt("tokenizer.json").max_new_tokens == read


@pytest.mark.parametrize("written", [0, -5, "many", 10**12])
def test_a_longest_answer_that_is_none_is_refused(make_checkpoint: Make, written: object) -> None:
    root = make_checkpoint("transformers-5", 1)
    (root / "generation_config.json").write_text(json.dumps({"max_new_tokens": written}))
    with pytest.raises(CheckpointError, match="max_new_tokens"):
        open_checkpoint(root).prompt("tokenizer.json")


def test_language_model_directory_is_a_plain_causal_lm(
    make_checkpoint: Make, tiny_model: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint("transformers-4", 3))
    checkpoint.write_language_model(tmp_path / "llm")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    assert type(plain).__name__ == "LlamaForCausalLM"
    ids = torch.tensor([[1, 5, 7, 8]])
    with torch.no_grad():
        expected = tiny_model(input_ids=ids).logits
        assert torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-6)
    assert (tmp_path / "llm" / "tokenizer.json").is_file()


def test_half_precision_tower_is_read_as_float32(
    tmp_path: Path, make_checkpoint: Make, tiny_model: LlavaForConditionalGeneration
) -> None:
    root = make_checkpoint()
    half = LlavaForConditionalGeneration.from_pretrained(root, dtype=torch.float16)
    half.save_pretrained(root)
    checkpoint = open_checkpoint(root)
    assert next(checkpoint.vision_model().parameters()).dtype is torch.float32
    assert next(checkpoint.projector().parameters()).dtype is torch.float32
    assert checkpoint.embedding_table().dtype is torch.float16
    assert checkpoint.language_model().dtype is torch.float16


def test_tied_embeddings_give_the_plain_model_its_head(
    make_checkpoint: Make, tiny_model: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    root = make_checkpoint("transformers-4")
    from safetensors.torch import load_file, save_file

    state = load_file(root / "model.safetensors")
    del state["language_model.lm_head.weight"]
    save_file(state, root / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"language model's tensors .* lm_head\.weight"):
        open_checkpoint(root).language_model()
    config = json.loads((root / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (root / "config.json").write_text(json.dumps(config))
    model = open_checkpoint(root).language_model()
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("holder", ["chat_template.json", "tokenizer_config.json"])
def test_chat_template_is_found_wherever_it_is(make_checkpoint: Make, holder: str) -> None:
    root = make_checkpoint()
    (root / "chat_template.jinja").unlink()
    if not (root / holder).is_file():
        (root / holder).write_text("{}")
    edit_json(root / holder, chat_template="hello {{ name }}")
    assert open_checkpoint(root).chat_template() == "hello {{ name }}"
    edit_json(root / holder, chat_template=None)
    with pytest.raises(CheckpointError, match="no chat template"):
        open_checkpoint(root).chat_template()


def test_image_processor_inside_processor_config(make_checkpoint: Make) -> None:
    root = make_checkpoint()
    fields = json.loads((root / "preprocessor_config.json").read_text())
    (root / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no image processor"):
        open_checkpoint(root)
    fields |= {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True}
    fields |= {"do_normalize": False, "do_rescale": False}
    (root / "processor_config.json").write_text(json.dumps({"image_processor": fields}))
    picture = open_checkpoint(root).preprocessing
    assert picture.pad_to_square
    assert (picture.rescale_factor, picture.mean, picture.std) == (1.0, (0,) * 3, (1,) * 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "video_llava"},
            r"model_type is 'video_llava'.*llava-hf/llava-1\.5-7b-hf",
        ),
        ({"vision_feature_layer": [-2, -5]}, r"layer is \[-2, -5\] and the tower has 4 layers"),
        ({"vision_feature_layer": []}, r"vision_feature_layer is \[\] and the tower has 4 layers"),
        ({"vision_feature_layer": 9}, "vision_feature_layer is 9 and the tower has 4 layers"),
        ({"vision_feature_layer": 0}, "vision_feature_layer is 0 and the tower has 4 layers"),
        (
            {"vision_config": {"model_type": "pixtral"}},
            "tower is 'pixtral', expected one of 'clip_vision_model'",
        ),
        ({"quantization_config": {"bits": 4}}, "quantized already"),
        ({"vision_feature_select_strategy": "some"}, "transformers cannot read it"),
    ],
)
def test_refuses_what_it_cannot_export(
    make_checkpoint: Make, fields: dict[str, object], message: str
) -> None:
    root = make_checkpoint()
    edit_json(root / "config.json", **fields)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(root)


def test_refuses_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory, and not the name"):
        open_checkpoint(tmp_path / "nowhere")


def test_refuses_pickled_weights_and_says_how_to_convert(make_checkpoint: Make) -> None:
    root = make_checkpoint()
    (root / "model.safetensors").rename(root / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled \(pytorch_model.bin\).*convert_checkpoint"):
        open_checkpoint(root)
    (root / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no weights found"):
        open_checkpoint(root)


def test_names_missing_shards(make_checkpoint: Make) -> None:
    root = make_checkpoint("transformers-4", 3)
    (root / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 weight shards.*model-00002-of-00003"):
        open_checkpoint(root)


def test_tells_damage_from_a_git_lfs_pointer(make_checkpoint: Make) -> None:
    root = make_checkpoint()
    weights = root / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        open_checkpoint(root)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(root)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_read_that_is_interrupted_is_not_called_damaged(
    make_checkpoint: Make,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    raised: type[BaseException],
) -> None:
    """safetensors turns whatever Python code raises while it makes a tensor into its own error."""

    def interrupted(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise SafetensorError("could not determine the shape of object type") from error

    checkpoint = open_checkpoint(make_checkpoint())
    monkeypatch.setattr(weights_module, "safe_open", interrupted)
    before = signal.signal(number, signal.SIG_DFL)  # ignored where tests run in the background
    try:
        with pytest.raises(raised), end_in_order():
            checkpoint.weights.read(Part.PROJECTOR)
    finally:
        signal.signal(number, before)


def test_tells_all_problems_together(make_checkpoint: Make) -> None:
    root = make_checkpoint()
    (root / "model.safetensors").unlink()
    edit_json(root / "preprocessor_config.json", crop_size=28, resample=9)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(root)
    for part in ("no weights found", "gives 28x28 pixels", "resample is 9"):
        assert part in str(raised.value)


def test_names_tensors_that_do_not_fit_the_configuration(make_checkpoint: Make) -> None:
    root = make_checkpoint()
    config = json.loads((root / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 5
    config["text_config"]["hidden_size"] = 96
    config["text_config"]["head_dim"] = 24
    (root / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(root)
    with pytest.raises(
        CheckpointError, match=r"vision tower's tensors .*\(missing: .*encoder\.layers\.4"
    ):
        checkpoint.vision_model()
    with pytest.raises(CheckpointError, match="projector's tensors"):
        checkpoint.projector()
    with pytest.raises(CheckpointError, match="language model's tensors"):
        checkpoint.language_model()


def test_an_unknown_image_token_is_told(make_checkpoint: Make) -> None:
    root = make_checkpoint()
    edit_json(root / "config.json", image_token_index=4000)
    with pytest.raises(CheckpointError, match="image token has id 4000"):
        open_checkpoint(root).prompt("tokenizer.json")


def test_a_name_downloads_only_safe_files(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    asked: dict[str, object] = {}

    def fake_download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        shutil.copytree(tiny_checkpoint, tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr(checkpoint_module, "snapshot_download", fake_download)
    checkpoint = open_checkpoint("someone/some-llava", revision="v1")
    assert checkpoint.name == "someone/some-llava"
    assert asked["revision"] == "v1"
    assert not any("bin" in str(p) or "pt" in str(p) for p in asked["allow_patterns"])  # type: ignore[attr-defined]


def test_a_directory_never_touches_the_network(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    checkpoint = open_checkpoint(tiny_checkpoint)
    checkpoint.vision_model()
    checkpoint.language_model()
    checkpoint.llava()
    checkpoint.prompt("tokenizer.json")


def test_a_download_that_fails_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **options: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(checkpoint_module, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded .* no route to host"):
        open_checkpoint("someone/some-llava")
