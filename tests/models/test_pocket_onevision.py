"""The pocket OneVision: its pictures, its clips, what training computes, and its checkpoint."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
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
from packing import encode, pack  # noqa: E402
from PIL import Image  # noqa: E402
from questions import ask_of_each  # noqa: E402
from training_loop import Learning, StepOutcome, run_steps  # noqa: E402
from training_state import ProgressLog, TrainingState  # noqa: E402
from view_store import ClipStore, PictureStore  # noqa: E402
from vocabulary import UNKNOWN, build_tokenizer  # noqa: E402

EVENTS = events.EVENTS


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


# ---------------------------------------------------------------- pictures


def test_picture_depends_on_seed_and_index_only():
    first, again = pictures.generate_picture(3, 8), pictures.generate_picture(3, 8)
    assert first.scene == again.scene
    np.testing.assert_array_equal(first.image, again.image)
    assert not np.array_equal(first.image, pictures.generate_picture(3, 9).image)
    assert pictures.ask_about(first, 3, 8) == pictures.ask_about(again, 3, 8)


def test_signs_are_apart_of_different_colours_and_each_in_one_tile():
    for index in range(80):
        scene = pictures.generate_picture(11, index).scene
        assert len({sign.color for sign in scene.signs}) == len(scene.signs)
        for sign in scene.signs:
            assert sign.x % 2 == sign.y % 2 == 0
            assert sign.x // 96 == (sign.x + signs.SIGN_SIZE - 1) // 96
            assert sign.y // 96 == (sign.y + signs.SIGN_SIZE - 1) // 96


def test_everything_in_a_picture_has_a_patch_in_a_tile_and_signs_in_the_base():
    for index in range(60):
        picture = pictures.generate_picture(12, index)
        numbers = set(range(1, len(picture.scene.objects) + 1))
        plates = {signs.MAX_SIGNS * 2 + 1 + n for n in range(len(picture.scene.signs))}
        assert set(picture.labels[picture.labels > 0].tolist()) == numbers | plates
        assert plates <= set(picture.base_labels.tolist())


def test_pattern_is_gone_in_the_base_view_and_its_colour_is_not():
    plates = {}
    for pattern in range(len(signs.PATTERNS)):
        image = np.full((192, 192, 3), 120, np.float32)
        owner = np.zeros((192, 192), np.int16)
        sign = signs.Sign(2, pattern, 40, 60)
        signs.paint_sign(image, owner, sign, 1, np.random.default_rng(0))
        plates[pattern] = image.clip(0, 255).astype(np.uint8)
    small = [pictures.shrink(image)[31:35, 21:25].astype(float) for image in plates.values()]
    large = [image[60:72, 40:52].astype(float) for image in plates.values()]
    for other in range(1, len(plates)):
        assert np.abs(small[other] - small[0]).mean() < 6
        assert np.abs(large[other] - large[0]).mean() > 20
    assert small[0][..., 2].mean() > 2 * small[0][..., 0].mean()  # blue


def test_signs_survive_the_array():
    drawn = pictures.generate_picture(13, 2).scene.signs
    assert signs.signs_from_array(signs.array_from_signs(drawn)) == drawn


def test_no_type_is_answered_by_its_majority():
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(1500):
        rng = np.random.default_rng((21, index))
        objects = pictures.draw_layout(rng).objects
        scene = pictures.PictureScene(objects, signs.draw_signs(rng, objects))
        happened = events._draw_events(rng, [int(kind) for kind in rng.permutation(20)[:2]])
        for question in ask_of_each(scene, rng, pictures.PICTURE_TYPES):
            answers[question.type][question.answer] += 1
        for question in ask_of_each(happened, rng, events.CLIP_TYPES):
            answers[question.type][question.answer] += 1
    assert set(answers) == set(pictures.PICTURE_TYPES) | set(events.CLIP_TYPES)
    for name, counted in answers.items():
        limit = 0.56 if name in ("exists", "path", "sign_exists") else 0.45
        assert counted.most_common(1)[0][1] / counted.total() < limit, name


def test_every_question_and_answer_is_in_the_vocabulary():
    unknown = build_tokenizer(with_video=True).convert_tokens_to_ids(UNKNOWN)
    for index in range(150):
        rng = np.random.default_rng((22, index))
        objects = pictures.draw_layout(rng).objects
        scene = pictures.PictureScene(objects, signs.draw_signs(rng, objects))
        happened = events._draw_events(rng, [3, 14])
        asked = ask_of_each(scene, rng, pictures.PICTURE_TYPES)
        asked += ask_of_each(happened, rng, events.CLIP_TYPES)
        for question in asked:
            assert unknown not in encode(f"{question.text} {question.answer}")


def test_answers_about_signs_follow_from_the_signs():
    for index in range(60):
        picture = pictures.generate_picture(14, index)
        shown = {sign.name for sign in picture.scene.signs}
        for question in pictures.ask_about(picture, 14, index):
            words = question.text.rstrip("?").split()
            if question.type == "sign_pattern":
                assert f"{words[4]} sign with {question.answer}" in shown
            elif question.type == "sign_color":
                found = [name for name in shown if name.endswith(words[-1])]
                assert found == [f"{question.answer} sign with {words[-1]}"]
            elif question.type == "sign_exists":
                assert (" ".join(words[-4:]) in shown) == (question.answer == "yes")


# ---------------------------------------------------------------- clips


@pytest.mark.parametrize("index", range(10))
def test_clip_shows_what_it_says_happened_one_after_the_other(index):
    clip, again = events.generate_event_clip(4, index), events.generate_event_clip(4, index)
    np.testing.assert_array_equal(clip.frames, again.frames)
    assert len({item.kind for item in clip.events}) == 2
    acting = [item for item in clip.events if EVENTS[item.event] != "nothing"]
    assert len({item.late for item in acting}) == len(acting)
    for actor in clip.events:
        seen = [
            next((item.x for item in layout.objects if item.kind == actor.kind), None)
            for layout in clip.layouts
        ]
        name = EVENTS[actor.event]
        assert (seen[0] is None) == (name == "entered")
        assert (seen[-1] is None) == (name == "left")
        rest = seen[:5] if actor.late else seen[3:]  # the half in which it does nothing
        if name == "moved":
            assert abs(seen[-1] - seen[0]) > 45
            assert abs(rest[-1] - rest[0]) < 11
        elif name != "nothing":
            assert len({place is None for place in rest}) == 1


def test_order_of_a_clip_is_that_of_its_halves():
    first, second = events.Event(0, 1, False), events.Event(7, 2, True)
    happened = events._in_order((second, first))
    assert happened == ["red ball entered", "green cylinder left"]
    rng = np.random.default_rng(0)
    assert events._ask_first((second, first), rng) == ("What happened first?", happened[0])
    assert events._ask_first((first, events.Event(3, 3, True)), rng) is None
    two_left = (events.Event(0, 2, False), second)
    assert events._ask_left(two_left, rng) is None


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
