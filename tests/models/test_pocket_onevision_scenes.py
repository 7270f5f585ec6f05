"""The pictures and clips of the pocket OneVision, and what is asked about them."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models" / "pocket-onevision"))

import events
import pictures
import signs
from packing import encode
from questions import ask_of_each
from vocabulary import UNKNOWN, build_tokenizer

EVENTS = events.EVENTS


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
