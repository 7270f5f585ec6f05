"""The pocket LLaVA: its scenes, its questions, its packing, and the checkpoint in the tree."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

CHECKPOINT = Path(__file__).resolve().parents[2] / "models" / "pocket-llava"
sys.path.insert(0, str(CHECKPOINT))

import evaluate  # noqa: E402
import language_stage  # noqa: E402
import seeds  # noqa: E402
from answering import answer_logits, right_answers  # noqa: E402
from architecture import build_model, look, tiles_from_images, tower_of  # noqa: E402
from clips import EVENTS, generate_clip  # noqa: E402
from layout import array_from_layout, draw_layout, objects_from_array  # noqa: E402
from packing import encode, pack  # noqa: E402
from questions import TYPES, ask_each_type  # noqa: E402
from reducers import REDUCERS, SeenBatch  # noqa: E402
from scenes import TEST_SEED, generate_scene, write_dataset  # noqa: E402
from tower_stage import Phase, TowerOptions, cut_windows, train_tower  # noqa: E402
from training_state import ProgressLog, TrainingState  # noqa: E402
from vocabulary import UNKNOWN, build_tokenizer  # noqa: E402


def _scenes(count: int, seed: int = 5):
    from scene_store import SceneStore

    drawn = [generate_scene(seed, index) for index in range(count)]
    return SceneStore(
        np.stack([image for _, image, _ in drawn]),
        np.stack([label for _, _, label in drawn]),
        np.stack([array_from_layout(layout) for layout, _, _ in drawn]),
    )


@pytest.fixture(scope="module")
def checkpoint():
    return evaluate.load_checkpoint(CHECKPOINT)


# ---------------------------------------------------------------- scenes and questions


def test_scene_depends_on_seed_and_index_only():
    first, again, other = generate_scene(3, 8), generate_scene(3, 8), generate_scene(3, 9)
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_every_object_is_visible_and_covers_a_few_patches():
    sizes = []
    for index in range(60):
        layout, _, labels = generate_scene(11, index)
        counts = np.bincount(labels[labels > 0], minlength=len(layout.objects) + 1)[1:]
        assert (counts >= 2).all()
        sizes += list(counts)
    assert 4 <= np.mean(sizes) <= 8


def test_layout_survives_the_array():
    layout = draw_layout(np.random.default_rng(2))
    restored = objects_from_array(array_from_layout(layout))
    assert [item.kind for item in restored] == [item.kind for item in layout.objects]
    assert [item.x for item in restored] == pytest.approx([item.x for item in layout.objects])


def test_no_type_is_answered_by_its_majority():
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(1500):
        rng = np.random.default_rng((21, index))
        for question in ask_each_type(draw_layout(rng).objects, rng):
            answers[question.type][question.answer] += 1
    assert set(answers) == set(TYPES)
    for name, counted in answers.items():
        limit = 0.56 if name in ("exists", "path") else 0.40
        assert counted.most_common(1)[0][1] / counted.total() < limit, name


def test_every_question_and_answer_is_in_the_vocabulary():
    unknown = build_tokenizer().convert_tokens_to_ids(UNKNOWN)
    for index in range(300):
        rng = np.random.default_rng((22, index))
        for question in ask_each_type(draw_layout(rng).objects, rng):
            assert unknown not in encode(f"{question.text} {question.answer}")


@pytest.mark.parametrize("index", range(6))
def test_clip_says_what_happened(index):
    clip = generate_clip(4, index)
    again = generate_clip(4, index)
    np.testing.assert_array_equal(clip.frames, again.frames)
    answers = {question.type.removeprefix("clip_"): question.answer for question in clip.questions}
    happened = {event for event in EVENTS if answers.get(event, "nothing") != "nothing"}
    assert happened == ({clip.event} - {"nothing"})
    kinds = [{item.kind for item in layout.objects} for layout in clip.layouts]
    assert (len(kinds[-1] - kinds[0]) == 1) == (clip.event == "entered")
    assert (len(kinds[0] - kinds[-1]) == 1) == (clip.event == "left")


def test_written_folder_is_the_layout_of_the_test_set(tmp_path):
    asked = write_dataset(TEST_SEED, 3, tmp_path)
    held_out = evaluate.read_held_out(tmp_path)
    assert [path.name for path in held_out.paths] == ["00000.png", "00001.png", "00002.png"]
    assert sum(map(len, held_out.questions)) == asked
    written = (tmp_path / "questions.jsonl").read_text().splitlines()
    kept = (CHECKPOINT / "test" / "questions.jsonl").read_text().splitlines()
    assert written == kept[: len(written)]


# ---------------------------------------------------------------- tokenizer


def test_tokenizer_reads_what_users_type_and_writes_natural_text():
    tokenizer = build_tokenizer()
    typed = tokenizer.encode("What COLOUR is the ball?")
    assert typed == tokenizer.encode("what color is the ball ?")
    assert tokenizer.decode(encode("red ball, green box")) == "red ball, green box"


def test_chat_template_holds_turns_and_a_system_prompt(checkpoint):
    _, processor = checkpoint
    image_and_text = [{"type": "image"}, {"type": "text", "text": "How many boxes are there?"}]
    messages = [
        {"role": "system", "content": "You are a robot."},
        {"role": "user", "content": image_and_text},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "Is the path clear?"},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == (
        "<s>You are a robot. USER: <image>\nHow many boxes are there? ASSISTANT: two</s>"
        "USER: Is the path clear? ASSISTANT:"
    )


# ---------------------------------------------------------------- training


def test_window_shows_the_tower_the_patches_of_its_place():
    store, rng = _scenes(4), np.random.default_rng(0)
    tiles, places, targets = cut_windows(store, np.arange(4), 12, rng)
    whole = tiles_from_images(torch.from_numpy(store.images)).flatten(1, 2)
    assert tiles.shape == (4, 144, 192)
    for index in range(4):
        assert torch.equal(tiles[index], whole[index, places[index]])
        shown = store.labels[index][places[index].numpy()]
        assert ((targets.color[index] > 0).numpy() == (shown > 0)).all()
    torch.testing.assert_close(targets.attention.sum(1), torch.ones(4))


def test_interrupted_tower_training_ends_where_an_uninterrupted_one_does(tmp_path):
    stores = {12: _scenes(8)}

    def run(images: list[int], name: str) -> torch.Tensor:
        tower = tower_of(build_model(0))
        for count in images:
            options = TowerOptions(phases=(Phase(12, count, 4),), learning_rate=1e-3)
            state = TrainingState(tmp_path / f"{name}.safetensors")
            log = ProgressLog(tmp_path / f"{name}.jsonl", "tower")
            options = TowerOptions(**{**options.__dict__, "warmup_steps": 10**6})
            train_tower(tower, stores, options, state, log, lambda: None)
        return tower.encoder.layers[0].mlp.fc1.weight.detach()

    # With a warm-up this long the rate depends on the step alone, not on the length of the run.
    torch.testing.assert_close(run([8, 16], "twice"), run([16], "once"), rtol=0, atol=1e-6)


def test_dropout_keeps_a_patch_of_every_object():
    labels = torch.from_numpy(_scenes(12).labels.astype(np.int64))
    chosen = language_stage.choose_patches(labels, 32)
    assert chosen.shape == (12, 32)
    for row, kept in zip(labels, chosen, strict=True):
        assert len(set(kept.tolist())) == 32
        assert set(row[row > 0].tolist()) == set(row[kept][row[kept] > 0].tolist())


def test_packed_questions_do_not_see_each_other():
    model = build_model(0).eval()
    store = _scenes(2)
    rng = np.random.default_rng(1)
    asked = [ask_each_type(objects_from_array(row), rng) for row in store.objects]
    tokens = torch.randn(2, 20, 128)
    together, _ = answer_logits(model, tokens, pack(asked))
    apart = [
        answer_logits(model, tokens[i : i + 1], pack([[question]]))[0]
        for i in range(2)
        for question in asked[i]
    ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- reducers and intervals


@pytest.mark.parametrize("name", sorted(REDUCERS))
@pytest.mark.parametrize("budget", [192, 64, 32])
def test_reducer_hands_on_its_budget(name, budget):
    seen = SeenBatch(torch.randn(3, 577, 8), torch.rand(3, 576), torch.randn(3, 576, 4))
    assert REDUCERS[name](seen, budget).shape == (3, budget, 8)


def test_wilson_interval_matches_a_known_value():
    low, high = evaluate.wilson_interval(81, 263)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=5e-4)


# ---------------------------------------------------------------- the checkpoint in the tree


def test_checkpoint_is_small_and_has_llava_geometry(checkpoint):
    model, processor = checkpoint
    files = ["model.safetensors", "tokenizer.json", "config.json", "processor_config.json"]
    assert sum((CHECKPOINT / name).stat().st_size for name in files) < 12e6
    assert sum(path.stat().st_size for path in (CHECKPOINT / "test").iterdir()) < 10e6
    assert model.config.vision_feature_layer == -2
    assert model.config.vision_feature_select_strategy == "default"
    inputs = processor(
        text="<s>USER: <image>\nIs the path clear? ASSISTANT:",
        images=np.zeros((192, 192, 3), np.uint8),
        return_tensors="pt",
    )
    assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == 576


def test_our_tower_pass_is_the_one_of_transformers(checkpoint):
    model, _ = checkpoint
    pixels = torch.randn(2, 3, 192, 192)
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        tiles = evaluate.tiles_from_pixels(pixels).flatten(1, 2)
        places = torch.arange(576).expand(2, -1)
        seen = look(tower_of(model), tiles, places)
    torch.testing.assert_close(seen.features, states[-2], rtol=1e-4, atol=1e-4)


def test_our_language_pass_is_the_one_of_transformers(checkpoint):
    model, processor = checkpoint
    held_out = evaluate.read_held_out(CHECKPOINT / "test")
    question = held_out.questions[0][0]
    seen = evaluate.see_pictures(model, processor, held_out.paths[:1])
    prompt = f"<s>USER: <image>\n{question.text} ASSISTANT: {question.answer}</s>"
    picture = evaluate.Image.open(held_out.paths[0])
    inputs = processor(text=prompt, images=picture, return_tensors="pt")
    with torch.no_grad():
        ours, targets = answer_logits(model, seen.features[:, 1:], pack([[question]]))
        theirs = model(**inputs).logits[0, -len(targets) - 1 : -1]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_checkpoint_answers_the_test_set(checkpoint):
    model, processor = checkpoint
    whole = evaluate.read_held_out(CHECKPOINT / "test")
    held_out = evaluate.HeldOut(whole.paths[:40], whole.questions[:40])
    seen = evaluate.see_pictures(model, processor, held_out.paths)
    right = evaluate.judge(model, seen, held_out)
    assert right.mean() > 0.8
    said = evaluate.compare_generate(model, processor, held_out, right, 12)
    assert said["same_verdict"] == 1.0


def test_right_answers_counts_whole_answers(checkpoint):
    model, _ = checkpoint
    whole = evaluate.read_held_out(CHECKPOINT / "test")
    text = pack(whole.questions[:2])
    right = right_answers(model, torch.zeros(2, 4, 128), text)
    assert right.shape == (sum(map(len, whole.questions[:2])),)


def test_card_shows_the_measured_numbers():
    report = json.loads((CHECKPOINT / "accuracy.json").read_text())
    card = (CHECKPOINT / "README.md").read_text()
    assert f"{report['all']['exact']:.1%}" in card
    assert f"{report['reducers']['64']['visionzip']['exact']:.1%}" in card
    assert seeds.table_of(seeds.read_reports()) in card


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_seed_keeps_what_the_card_claims(seed):
    report = seeds.read_reports()[seed]
    small, smallest = report["reducers"]["64"], report["reducers"]["32"]
    assert report["all"]["interval"][0] > 0.95
    assert small["visionzip_kept"][0] > 0.92
    assert small["visionzip_over_uniform"][0] > 0.04
    assert small["visionzip_over_random"][0] > 0.10
    assert smallest["visionzip"]["exact"] > smallest["uniform"]["exact"]
    assert smallest["uniform"]["exact"] > smallest["random"]["exact"]
    assert report["generate"]["same_verdict"] == 1.0
