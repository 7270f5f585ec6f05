r"""Read and check LLaVA-format conversations.

The file is `[{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value":
"<image>\nWhat is this?"}, {"from": "gpt", "value": "A cone."}, ...]}, ...]`. Its pictures are in
a directory. A conversation whose picture is missing is counted and left out. Anything else that is
wrong is an error that names the entries.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from engines.errors import OptionError

IMAGE = "<image>"
MOST_UNUSABLE = 0.1
"""Share of the conversations that may be unusable before the run is refused."""
_SHOWN = 5


@dataclass(frozen=True)
class Conversation:
    """Questions about one picture and their answers.

    Attributes:
        name: its `id`, or its number in the file.
        image: the picture's file, relative to the directory of pictures.
        rounds: (question, answer) in order; the picture comes before the first question.
    """

    name: str
    image: str
    rounds: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ConversationSet:
    """What a file holds.

    Attributes:
        conversations: those that can be used.
        text_only: how many are not about a picture, and were left out.
        missing: names of those whose picture is not there.
    """

    conversations: tuple[Conversation, ...]
    text_only: int
    missing: tuple[str, ...]


class _Message(BaseModel):
    speaker: Literal["human", "gpt"] = Field(alias="from")
    value: str


class _Entry(BaseModel):
    id: str | int | None = None
    image: str | None = None
    conversations: list[_Message]


def read_conversations(file: Path, images: Path) -> ConversationSet:
    """Read a file of conversations.

    Raises:
        OptionError: the file cannot be read; entries are not in LLaVA's format (the first few are
            named); more than a tenth of the pictures are missing; or nothing is left.
    """
    if not images.is_dir():
        raise OptionError(f"--images {images} does not exist, expected the directory of pictures.")
    found: list[Conversation] = []
    problems: list[str] = []
    text_only = 0
    for number, entry in enumerate(_read_entries(file)):
        try:
            conversation = _conversation_from(entry, number)
        except ValueError as problem:
            problems.append(f"{_name_of(entry, number)}: {problem}")
            continue
        if conversation is None:
            text_only += 1
        else:
            found.append(conversation)
    if problems:
        rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise OptionError(
            f"{file}: {len(problems)} entries are not in LLaVA's format: "
            f"{'; '.join(problems[:_SHOWN])}{rest}. Correct or remove them."
        )
    there = {image: (images / image).is_file() for image in {one.image for one in found}}
    missing = tuple(f"{one.name} ({one.image})" for one in found if not there[one.image])
    refuse_unusable(missing, len(found), f"have no picture in {images}")
    usable = tuple(one for one in found if there[one.image])
    if not usable:
        raise OptionError(f"{file}: no entry is about a picture, expected at least two.")
    return ConversationSet(usable, text_only, missing)


def refuse_unusable(unusable: Sequence[str], total: int, what: str) -> None:
    """Refuse a data set if too much of it cannot be used.

    Args:
        unusable: the names of what cannot.
        total: how many there are in all.
        what: what is wrong with them.

    Raises:
        OptionError: it is more than a tenth.
    """
    if len(unusable) > MOST_UNUSABLE * total:
        raise OptionError(
            f"{len(unusable)} of {total} conversations {what}: {', '.join(unusable[:_SHOWN])} ... "
            f"Up to {MOST_UNUSABLE:.0%} are left out; with more the data set is not what it should "
            "be. Check --data and --images."
        )


def _read_entries(file: Path) -> list[Any]:
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"--data {file} cannot be read ({error}), expected LLaVA-format JSON."
        ) from error
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(
            f"{file}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}, in entry "
            f"{_entry_at(text, error.pos)}. Correct it there."
        ) from error
    if not isinstance(entries, list):
        raise OptionError(
            f"{file}: expected a list of conversations, got {type(entries).__name__}. LLaVA's "
            'format is [{"id": ..., "image": ..., "conversations": [...]}, ...].'
        )
    return entries


def _entry_at(text: str, position: int) -> int:
    """Return the number of the entry that a position of a damaged file lies in, from 0."""
    decoder = json.JSONDecoder()
    at, number = text.find("[") + 1, 0
    while True:
        while at < position and (text[at].isspace() or text[at] == ","):
            at += 1
        try:
            _, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return number
        number += 1


def _conversation_from(entry: Any, number: int) -> Conversation | None:
    """Check one entry; None where it is not about a picture.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        checked = _Entry.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from error
    messages = checked.conversations
    marks = [message.value.count(IMAGE) for message in messages]
    if checked.image is None and not any(marks):
        return None
    if checked.image is None:
        raise ValueError(f"{IMAGE} without an image")
    if sum(marks) != 1 or marks[0] != 1:
        raise ValueError(f"expected {IMAGE} once, in its first message, found {sum(marks)}")
    speakers = [message.speaker for message in messages]
    if len(messages) % 2 or speakers != ["human", "gpt"] * (len(messages) // 2):
        raise ValueError(f"expected human and gpt in turns, got {', '.join(speakers)}")
    texts = [message.value.replace(IMAGE, "").strip() for message in messages]
    if not all(texts[1::2]):
        raise ValueError("an answer is empty")
    rounds = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Conversation(_name_of(entry, number), checked.image, rounds)


def _name_of(entry: Any, number: int) -> str:
    given = entry.get("id") if isinstance(entry, dict) else None
    return f"entry {number}" if given is None else f"entry {number} (id {given!r})"
