"""Conversations as they are read, and as ids and targets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.errors import OptionError
from engines.manifest import Prompt
from export.checkpoint.llava import open_checkpoint
from export.tune.conversations import Conversation, read_conversations
from export.tune.training_text import (
    IGNORED,
    TrainingText,
    count_targets,
    fit_text,
    group_rows,
    write_text,
)
from runtime.language.prompt import PromptWriter, Turn

POCKET = Path(__file__).parents[2] / "models" / "pocket-llava"


def entry(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
    return {"id": "one", "image": "a.png", "conversations": turns} | changes


def read(folder: Path, content: Any, pictures: int = 1) -> Any:
    for number in range(pictures):
        (folder / f"{'abcdefghijkl'[number]}.png").write_bytes(b"")
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "chat.json").write_text(text)
    return read_conversations(folder / "chat.json", folder)


def writer_of(root: Path, **changes: Any) -> PromptWriter:
    prompt = open_checkpoint(root).prompt("tokenizer.json")
    return PromptWriter.from_prompt(
        Prompt.model_validate(prompt.model_dump() | changes), root / "tokenizer.json"
    )


# ------------------------------------------------------------------ reading


def test_text_only_and_missing_pictures_are_counted(tmp_path: Path) -> None:
    text_only = entry(image=None, conversations=[
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."},
    ])  # fmt: skip
    entries = [entry(image=f"{letter}.png") for letter in "abcdefghijk"]
    read_back = read(tmp_path, [*entries, text_only], pictures=10)
    assert len(read_back.conversations) == 10
    assert read_back.text_only == 1
    assert read_back.missing == ("entry 10 (id 'one') (k.png)",)
    assert read_back.conversations[0].rounds == (("What?", "A cup."),)


def test_more_than_a_tenth_missing_is_refused(tmp_path: Path) -> None:
    entries = [entry(image=f"{letter}.png") for letter in "abcd"]
    with pytest.raises(OptionError, match=r"1 of 4 conversations have no picture.*d\.png"):
        read(tmp_path, entries, pictures=3)


HUMAN, GPT = {"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "B."}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"id": 1}, {"id": 2}, {"id": }]', "not JSON: .* line 1, column .*, in entry 2"),
        ("{}", "expected a list of conversations, got dict"),
        ([entry(), entry(id="bad", conversations="no")], r"entry 1 \(id 'bad'\): conversations: "),
        ([entry(conversations=[HUMAN, {"value": "B."}])], r"entry 0 .*conversations\.1\.from"),
        ([entry(conversations=[HUMAN, {"from": "bot", "value": "B"}])], "'human' or 'gpt'"),
        ([entry(conversations=[GPT, HUMAN])], "in its first message"),
        ([entry(conversations=[HUMAN, HUMAN])], "in its first message, found 2"),
        ([entry(conversations=[HUMAN])], "human and gpt in turns, got human"),
        ([entry(conversations=[{"from": "human", "value": "A?"}, GPT])], "<image> once.*found 0"),
        ([entry(image=None)], "<image> without an image"),
        ([entry(conversations=[HUMAN, {"from": "gpt", "value": " "}])], "an answer is empty"),
        ([7], "entry 0: "),
        ([], "no entry is about a picture"),
        ([entry(id=n, conversations=[]) for n in range(9)], "9 entries are not.*and 4 more"),
    ],
)
def test_a_bad_file_names_its_entries(tmp_path: Path, content: Any, expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        read(tmp_path, content)


def test_a_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"chat\.json cannot be read"):
        read_conversations(tmp_path / "chat.json", tmp_path)
    with pytest.raises(OptionError, match=r"--images .* does not exist"):
        read_conversations(tmp_path / "chat.json", tmp_path / "nowhere")


# ------------------------------------------------------------------ ids and targets


def test_targets_are_what_the_pocket_model_was_trained_on() -> None:
    sys.path.insert(0, str(POCKET))
    from packing import encode, encode_prefix, pack
    from questions import Question

    question = Question("left_of", "What is left of the red box?", "blue ball")
    theirs = pack([[question]])
    ours = write_text(
        writer_of(POCKET), Conversation("one", "a.png", ((question.text, question.answer),))
    )
    assert ours.before == encode_prefix(False)
    assert list(ours.ids) == theirs.ids[0, :-1].tolist()
    assert list(ours.targets) == theirs.targets[0, :-1].tolist()
    assert ours.targets[-3:] == encode("blue ball</s>")


def test_every_answer_of_a_conversation_is_learned(language_checkpoint: Path) -> None:
    writer = writer_of(language_checkpoint)
    rounds = (("Where?", "On the left."), ("And then?", "Right."))
    text = write_text(writer, Conversation("one", "a.png", rounds))
    learned = [token for token in text.targets if token != IGNORED]
    decoded = writer.tokenizer.decode(learned, skip_special_tokens=False)
    assert decoded == " On the left.</s> Right.</s>"
    # The prompt a target was written behind is the prompt that the runtime will send.
    first = next(at for at, token in enumerate(text.targets) if token != IGNORED)
    asked = writer.ids([Turn("user", "Where?", images=1)]).tolist()
    assert [*text.before, writer.image_token_id, *text.ids[: first + 1]] == asked


def test_a_template_without_a_stop_token_still_teaches_to_stop(language_checkpoint: Path) -> None:
    template = open_checkpoint(language_checkpoint).chat_template()
    writer = writer_of(language_checkpoint, chat_template=template.replace("{{ eos_token }}", " "))
    text = write_text(writer, Conversation("one", "a.png", (("Where?", "Left."), ("And?", "Up."))))
    learned = [token for token in text.targets if token != IGNORED]
    decoded = writer.tokenizer.decode(learned, skip_special_tokens=False)
    assert decoded == " Left.</s> Up.</s>"
    assert 2 not in text.ids


def test_a_template_that_rewrites_the_question_is_refused(language_checkpoint: Path) -> None:
    template = open_checkpoint(language_checkpoint).chat_template()
    marked = "{{ messages | length }}" + template
    writer = writer_of(language_checkpoint, chat_template=marked)
    with pytest.raises(OptionError, match="one: the checkpoint's chat template"):
        write_text(writer, Conversation("one", "a.png", (("Where?", "Left."),)))


def test_a_long_conversation_keeps_the_rounds_that_fit() -> None:
    i = IGNORED
    text = TrainingText((1, 2), (3, 4, 5, 6, 7, 8), (i, 9, 9, i, i, 9))
    assert fit_text(text, 8) == text
    assert fit_text(text, 7) == TrainingText((1, 2), (3, 4, 5), (i, 9, 9))
    assert fit_text(text, 5) == TrainingText((1, 2), (3, 4, 5), (i, 9, 9))
    assert fit_text(text, 4) is None
    assert fit_text(text, 1) is None


def test_conversations_about_one_picture_share_rows() -> None:
    text = TrainingText((1,), (3, 4, 5), (IGNORED, 9, 9))
    rows = group_rows([("a", text), ("b", text), ("a", text), ("a", text)], 6)
    assert [(row.image, len(row.texts)) for row in rows] == [("a", 2), ("a", 1), ("b", 1)]
    assert count_targets(rows) == 8
