"""Conversations: equal to starting over, cheaper than it, and within the context."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.errors import BackendError, OptionError, PictureError
from runtime.camera.answering import FrameAnswerer
from runtime.conversation import Conversation
from runtime.language.generate import GenerationOptions
from runtime.language.prompt import Turn
from runtime.model import Model, open_model
from runtime.transcript import restore_conversation, save_conversation

SHORT = GenerationOptions(max_tokens=6)
FIRST, SECOND = (
    np.random.default_rng(seed).integers(0, 255, (30, 30, 3), np.uint8) for seed in (0, 1)
)


@pytest.fixture(scope="module")
def model(language_bundle: Bundle) -> Iterator[Model]:
    with open_model(language_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def narrow(language_bundle: Bundle) -> Iterator[Model]:
    """A model whose context holds about two exchanges."""
    with open_model(language_bundle, threads=1, context_length=230) as opened:
        yield opened


def starting_over(model: Model, turns: list[Turn], pictures: list[np.ndarray]) -> str:
    """The answer of a model that has nothing in its cache."""
    model.context.prefill([np.array([250, 251])])
    answer = model.answer(turns, [model.encoder.encode([p]).tokens_of(0) for p in pictures], SHORT)
    assert answer.reused_tokens == 0
    return answer.text


def test_follow_up_questions_equal_starting_over_and_cost_their_own_tokens(model: Model) -> None:
    conversation = Conversation(model, system="Be brief.")
    conversation.show(FIRST, "first.png")
    one = conversation.ask("What is in the picture?", SHORT)
    two = conversation.ask("How many chairs?", SHORT)
    conversation.show(SECOND)
    three = conversation.ask("And here?", SHORT)
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "What is in the picture?", images=1),
        Turn("assistant", one.text),
        Turn("user", "How many chairs?"),
        Turn("assistant", two.text),
        Turn("user", "And here?", images=1),
    ]
    assert (one.visual_tokens, two.visual_tokens, three.visual_tokens) == (16, 0, 16)
    assert two.reused_tokens >= one.prompt_tokens
    assert three.reused_tokens >= two.prompt_tokens
    assert one.text == starting_over(model, turns[:2], [FIRST])
    assert two.text == starting_over(model, turns[:4], [FIRST])
    assert three.text == starting_over(model, turns, [FIRST, SECOND])
    assert set(two.milliseconds) == {"preprocess", "encode", "prefill", "decode", "total"}
    assert two.milliseconds["encode"] == 0


def test_a_new_frame_keeps_what_is_before_the_picture(model: Model) -> None:
    conversation = Conversation(model, system="Be brief.")
    conversation.show(FIRST)
    conversation.ask("What is in the picture?", SHORT)
    conversation.ask("How many chairs?", SHORT)
    conversation.replace_image(SECOND)
    assert conversation.exchanges == []
    answer = conversation.ask("What is in the picture?", SHORT)
    turns = [Turn("system", "Be brief."), Turn("user", "What is in the picture?", images=1)]
    place = model.writer.ids(turns).tolist().index(model.writer.image_token_id)
    assert answer.reused_tokens == place
    assert answer.text == starting_over(model, turns, [SECOND])


def test_a_frame_replaces_only_the_last_of_several_pictures(model: Model) -> None:
    conversation = Conversation(model)
    conversation.show(FIRST, "a")
    conversation.show(FIRST, "b")
    conversation.ask("Compare them.", SHORT)
    conversation.replace_image(SECOND, "c")
    assert [picture.name for picture in conversation.images] == ["a", "c"]
    conversation.replace_image(FIRST, "d")
    assert [picture.name for picture in conversation.images] == ["a", "d"]
    assert conversation.ask("Compare them.", SHORT).visual_tokens == 16
    fresh = Conversation(model)
    fresh.replace_image(FIRST, "only")
    assert [picture.name for picture in fresh.images] == ["only"]


def test_a_full_context_drops_the_oldest_and_keeps_system_and_picture(narrow: Model) -> None:
    conversation = Conversation(narrow, system="Be brief.")
    conversation.show(FIRST, "kept")
    options = GenerationOptions(max_tokens=20)
    for number in range(6):
        answer = conversation.ask(f"What is in the picture, question {number}?", options)
        assert answer.prompt_tokens + 20 <= narrow.context.context_length
    assert conversation.dropped > 0
    assert conversation.dropped + len(conversation.exchanges) == 6
    assert [picture.name for picture in conversation.images] == ["kept"]
    assert conversation.exchanges[0].images[0].name == "kept"


def test_a_question_that_cannot_fit_changes_nothing(narrow: Model) -> None:
    conversation = Conversation(narrow)
    conversation.show(FIRST)
    conversation.ask("What is it?", SHORT)
    before = list(conversation.exchanges)
    with pytest.raises(BackendError, match="context holds 230"):
        conversation.ask("why? " * 200, SHORT)
    assert conversation.exchanges == before
    assert conversation.dropped == 0
    conversation.ask("And now?", SHORT)


def test_a_bad_picture_changes_nothing(model: Model) -> None:
    conversation = Conversation(model)
    conversation.show(FIRST, "good")
    conversation.ask("What is it?", SHORT)
    for place in (conversation.show, conversation.replace_image):
        with pytest.raises(PictureError):
            place(np.zeros((4, 4), np.uint8))
    assert [picture.name for picture in conversation.images] == ["good"]


def test_reset_forgets(model: Model) -> None:
    conversation = Conversation(model, system="Be brief.")
    conversation.show(FIRST)
    conversation.ask("What is it?", SHORT)
    conversation.show(SECOND)
    conversation.reset()
    assert conversation.images == ()
    assert conversation.exchanges == []
    assert conversation.system == "Be brief."


def test_a_saved_conversation_goes_on_as_if_it_had_never_stopped(
    model: Model, tmp_path: Path
) -> None:
    conversation = Conversation(model, system="Be brief.")
    conversation.show(FIRST, "first.png")
    conversation.ask("What is in the picture? 日本", SHORT)
    save_conversation(conversation, tmp_path / "talk.json")
    restored = restore_conversation(model, tmp_path / "talk.json")
    assert restored.system == conversation.system
    assert [said.answer for said in restored.exchanges] == [
        said.answer for said in conversation.exchanges
    ]
    assert np.array_equal(restored.images[0].tokens, conversation.images[0].tokens)
    expected = conversation.ask("How many?", SHORT)
    model.context.prefill([np.array([250, 251])])
    answer = restored.ask("How many?", SHORT)
    assert answer.reused_tokens == 0
    assert answer.text == expected.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a saved conversation"),
        ("[]", "not a saved conversation"),
        ('{"foveate_conversation": 1}', "not a saved conversation"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_conversation(
    model: Model, tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "talk.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(OptionError, match=message):
        restore_conversation(model, file)


def test_a_conversation_with_another_model_is_refused(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    save_conversation(Conversation(model), file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"language_model": "0" * 64}))
    with pytest.raises(OptionError, match="whose embedding table is another"):
        restore_conversation(model, file)


def test_two_conversations_over_one_model_do_not_mix(model: Model) -> None:
    ours, theirs = Conversation(model), Conversation(model, system="Be brief.")
    ours.show(FIRST)
    theirs.show(SECOND)
    ours.ask("What is it?", SHORT)
    theirs.ask("What is that?", SHORT)
    mine = ours.ask("How many?", SHORT).text
    turns = [
        Turn("user", "What is it?", images=1),
        Turn("assistant", ours.exchanges[0].answer or ""),
        Turn("user", "How many?"),
    ]
    assert mine == starting_over(model, turns, [FIRST])
    assert replace(theirs.exchanges[0], answer=None).question == "What is that?"


@pytest.mark.parametrize("given", [None, GenerationOptions(max_tokens=3)])
def test_the_checkpoints_longest_answer_counts_where_the_user_gives_none(
    model: Model, monkeypatch: pytest.MonkeyPatch, given: GenerationOptions | None
) -> None:
    prompt = model.bundle.manifest.prompt.model_copy(update={"max_new_tokens": 5})
    manifest = model.bundle.manifest.model_copy(update={"prompt": prompt})
    monkeypatch.setattr(model, "bundle", replace(model.bundle, manifest=manifest))
    limit = 5 if given is None else 3
    conversation = Conversation(model)
    conversation.show(FIRST)
    visual = model.encoder.encode([FIRST])
    told = [
        model.ask(FIRST, "What is it?", given),
        conversation.ask("What is it?", given),
        FrameAnswerer(model, given).answer(visual, "What is it?", lambda: None, lambda: False),
    ]
    for answer in told:  # random weights hardly ever stop by themselves
        assert (len(answer.token_ids), answer.finish) == (limit, "max_tokens")
