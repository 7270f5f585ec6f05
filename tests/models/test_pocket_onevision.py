"""The pocket OneVision: what its training computes, its stages, and its checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models" / "pocket-onevision"))

import onevision  # noqa: E402  (first: it makes pocket-llava's modules importable)

import accuracy  # noqa: E402  # isort: skip
import events  # noqa: E402
import pictures  # noqa: E402
import reading_stage  # noqa: E402
import signs  # noqa: E402
import tile_stage  # noqa: E402
from answering import read_visual  # noqa: E402
from architecture import tower_of  # noqa: E402
from feature_cache import cache_features  # noqa: E402
from layout import Layout, array_from_layout  # noqa: E402
from onevision_checkpoint import open_processor, write_checkpoint  # noqa: E402
from packing import pack  # noqa: E402
from PIL import Image  # noqa: E402
from questions import ask_of_each  # noqa: E402
from training_loop import Learning, StepOutcome, run_steps  # noqa: E402
from training_state import ProgressLog, TrainingState  # noqa: E402
from view_store import ClipStore, PictureStore  # noqa: E402


def _store(count: int, dense: bool = False) -> PictureStore:
    drawn = [pictures.generate_picture(5, index, dense) for index in range(count)]
    return PictureStore(
        np.stack([picture.image for picture in drawn]),
        np.stack([pictures.shrink(picture.image) for picture in drawn]),
        np.stack([picture.labels for picture in drawn]),
        np.stack([picture.base_labels for picture in drawn]),
        np.stack([array_from_layout(Layout(0.0, picture.scene.objects)) for picture in drawn]),
        np.stack([signs.array_from_signs(picture.scene.signs) for picture in drawn]),
    )


def _clips(count: int) -> ClipStore:
    drawn = [events.generate_event_clip(5, index) for index in range(count)]
    actors = [[(item.kind, item.event, item.late) for item in clip.events] for clip in drawn]
    return ClipStore(
        np.stack([clip.frames for clip in drawn]),
        np.stack([clip.labels for clip in drawn]),
        np.array(actors, np.int8),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of random weights, as it is written and as it is opened again."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(onevision.build_model(0), folder)
    return folder, *accuracy.load_checkpoint(folder)


# ---------------------------------------------------------------- training and transformers


def test_views_are_the_pixels_of_the_processor(checkpoint):
    _, _, processor = checkpoint
    picture = pictures.generate_picture(3, 1)
    given = processor.image_processor(Image.fromarray(picture.image), return_tensors="pt")
    store = _store(1)
    image = torch.from_numpy(picture.image[None])
    views = onevision.cut_views(image, torch.tensor(pictures.shrink(picture.image)[None]))
    torch.testing.assert_close(onevision.normalise(views[0]), given["pixel_values"][0])
    assert store.images.shape[1:] == picture.image.shape


@torch.no_grad()
def test_picture_path_is_the_one_of_transformers(checkpoint):
    _, model, processor = checkpoint
    picture = pictures.generate_picture(3, 1)
    question = pictures.ask_about(picture, 3, 1)[-1]
    prompt = f"<s>USER: <image>\n{question.text} ASSISTANT: {question.answer}</s>"
    inputs = processor(text=prompt, images=Image.fromarray(picture.image), return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 744
    pixels = inputs["pixel_values"][0]
    features = onevision.look(tower_of(model), pixels).features
    tokens = onevision.picture_tokens(model, onevision.order_views(features[None]))
    theirs = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    torch.testing.assert_close(tokens[0], theirs.pooler_output[0], rtol=1e-4, atol=1e-4)
    ours, targets = read_visual(model, tokens, pack([[question]]))
    logits = model(**inputs).logits[0, -len(targets) - 1 : -1]
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_clip_path_is_the_one_of_transformers(checkpoint):
    _, model, processor = checkpoint
    clip = events.generate_event_clip(3, 1)
    question = events.ask_about_clip(clip.events, 3, 1)[-1]
    pixels = onevision.normalise(torch.from_numpy(clip.frames))
    features = onevision.look(tower_of(model), pixels).features
    tokens = onevision.clip_tokens(model, features[None])
    theirs = model.model.get_video_features(pixels[None]).pooler_output
    torch.testing.assert_close(tokens, theirs, rtol=1e-4, atol=1e-4)
    video = "<video>" * reading_stage.CLIP_TOKENS
    prompt = f"<s>USER: {video}\n{question.text} ASSISTANT: {question.answer}</s>"
    ids = processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ours, targets = read_visual(model, tokens, pack([[question]]))
    logits = model(ids, pixel_values_videos=pixels[None]).logits[0, -len(targets) - 1 : -1]
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_attention_received_is_that_of_the_last_layer(checkpoint):
    folder, model, _ = checkpoint
    eager = onevision.LlavaOnevisionForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    pixels = torch.randn(2, 3, 96, 96)
    theirs = eager.model.vision_tower(pixels, output_attentions=True).attentions[-1]
    seen = onevision.look(tower_of(model), pixels)
    torch.testing.assert_close(seen.received, theirs.mean((1, 2)), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(seen.received.sum(1), torch.ones(2))


def test_checkpoint_is_small_and_names_the_classes_of_transformers(checkpoint):
    folder, model, _ = checkpoint
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    assert type(model).__name__ == "LlavaOnevisionForConditionalGeneration"
    settings = transformers.AutoConfig.from_pretrained(folder)
    assert settings.vision_config.model_type == "siglip_vision_model"
    assert settings.text_config.model_type == "qwen2"
    assert settings.image_grid_pinpoints == [[96, 96], [96, 192], [192, 96], [192, 192]]
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    assert images.image_grid_pinpoints == settings.image_grid_pinpoints


def test_chat_template_places_a_clip(checkpoint):
    processor = open_processor(checkpoint[0])
    content = [{"type": "video"}, {"type": "text", "text": "What moved?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert prompt == "<s>USER: <video>\nWhat moved? ASSISTANT:"


# ---------------------------------------------------------------- stages


def test_targets_of_a_view_name_what_its_patches_show():
    store = _store(6, dense=True)
    chosen = np.arange(6)
    slots = tile_stage.describe_slots(store, chosen)
    labels = tile_stage.split_labels(store, chosen)
    for view in range(5):
        targets = tile_stage.make_targets(labels[:, view], slots, np.full(6, view))
        for row in range(6):
            scene = store.scene(row)
            for patch in np.flatnonzero(labels[row, view] > 0):
                number = labels[row, view, patch] - 1
                if number < 8:
                    item = scene.objects[number]
                    wanted = (1 + item.color, 1 + item.shape)
                else:
                    sign = scene.signs[number - 8]
                    wanted = (1 + sign.color, 9 if view == 0 else 5 + sign.pattern)
                assert (targets.color[row, patch], targets.shape[row, patch]) == wanted
        shown = torch.from_numpy((labels[:, view] > 0).any(1))
        torch.testing.assert_close(targets.attention.sum(1), shown.float())


def test_dropout_keeps_one_token_of_everything_in_base_and_tiles():
    store = _store(8)
    features = torch.zeros(8, 1, 1)
    labels = reading_stage.SeenPictures(features, store).labels(np.arange(8))
    assert labels.shape == (8, onevision.VIEWS_TOKENS)
    torch.manual_seed(0)
    kept = reading_stage._keep(labels, 60)
    assert (kept[:, 1:] > kept[:, :-1]).all()
    for row, places in zip(labels, kept, strict=True):
        assert set(row[row > 0].tolist()) == set(row[places][row[places] > 0].tolist())


def test_dropout_of_a_clip_keeps_every_object_in_every_frame():
    store = _clips(4)
    labels = reading_stage.SeenClips(torch.zeros(4, 1, 1, 1), store).labels(np.arange(4))
    assert labels.shape == (4, reading_stage.CLIP_TOKENS)
    kept = reading_stage._keep(labels, 80)
    for row, places in zip(labels, kept, strict=True):
        assert set(row[row > 0].tolist()) == set(row[places][row[places] > 0].tolist())


def test_interrupted_feature_cache_is_continued(tmp_path):
    calls: list[int] = []

    def see(part: slice) -> torch.Tensor:
        calls.append(part.start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return torch.arange(part.start, part.stop, dtype=torch.bfloat16)[:, None]

    with pytest.raises(KeyboardInterrupt):
        cache_features(tmp_path / "kept.bin", 50, (1,), see)
    kept = cache_features(tmp_path / "kept.bin", 50, (1,), see)
    assert calls == [0, 20, 20, 40]
    assert kept[:, 0].tolist() == list(range(50))


def test_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path):
    def run(name: str, stop_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 4)
        state = TrainingState(tmp_path / f"{name}.safetensors")
        log = ProgressLog(tmp_path / f"{name}.jsonl", "test")

        def losses_at(step: int) -> StepOutcome:
            if step == stop_at:
                raise KeyboardInterrupt
            torch.manual_seed(step)
            return StepOutcome({"square": module(torch.randn(8, 4)).square().mean()}, 8, "")

        run_steps(module, Learning(8, 1e-2, 0.0, 2), losses_at, state, log, dict, save_every=2)
        return module.weight.detach()

    with pytest.raises(KeyboardInterrupt):
        run("twice", 5)
    torch.testing.assert_close(run("twice", None), run("once", None), rtol=0, atol=0)


@torch.no_grad()
def test_all_tokens_kept_are_all_tokens(checkpoint):
    _, model, _ = checkpoint
    torch.manual_seed(0)
    features, frames = torch.randn(2, 720, 128), torch.randn(2, 8, 144, 128)
    every = torch.arange(onevision.VIEWS_TOKENS).expand(2, -1)
    whole = onevision.picture_tokens(model, features)
    torch.testing.assert_close(onevision.picture_tokens(model, features, every), whole)
    few = torch.tensor([[0, 168, 743], [5, 6, 7]])
    some = onevision.picture_tokens(model, features, few)
    torch.testing.assert_close(some[0], whole[0, few[0]])
    clip = onevision.clip_tokens(model, frames)
    chosen = onevision.clip_tokens(model, frames, few.clamp(max=288))
    torch.testing.assert_close(chosen[1], clip[1, few[1]])
    torch.testing.assert_close(chosen[0, 2], clip[0, 288])


def test_clip_without_questions_is_packed_beside_others():
    asked = ask_of_each((events.Event(0, 1, False),), np.random.default_rng(0), events.CLIP_TYPES)
    text = pack([[], asked, []])
    assert text.asked == asked
    assert (text.blocks[0] == -1).all()
    assert (text.targets[[0, 2]] == -100).all()


# ---------------------------------------------------------------- measuring


@pytest.mark.parametrize("name", sorted(accuracy.REDUCERS))
def test_reducer_keeps_its_budget_in_order_and_no_newline(name):
    source = onevision.place_newlines()
    scores = torch.rand(3, onevision.VIEWS_TOKENS).masked_fill(source < 0, -1.0)
    kept = accuracy.REDUCERS[name](scores, 82)
    assert kept.shape == (3, 82)
    assert (kept[:, 1:] > kept[:, :-1]).all()
    assert (source[kept] >= 0).all()


def test_report_of_random_weights_has_every_part(checkpoint, tmp_path):
    folder, _, _ = checkpoint
    asked = pictures.write_pictures(3, 3, tmp_path / "pictures")
    told = events.write_clips(3, 3, tmp_path / "clips")
    report = accuracy.evaluate_checkpoint(folder, tmp_path / "pictures", tmp_path / "clips", 1)
    assert report["pictures"]["all"]["count"] == asked
    assert report["clips"]["all"]["count"] == told
    assert report["pictures"]["generate"]["same_verdict"] == 1.0
    assert report["clips"]["generate"]["same_verdict"] == 1.0
    table = accuracy.format_report(report)
    assert "| sign_pattern |" in table
    assert "| clip_order |" in table
