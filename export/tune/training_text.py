"""Turn conversations into token ids with targets, several about one picture in one row.

The conversations of a row do not see each other and have the positions they would have alone, so
the picture is read once for all of them. Targets are the answers and the stop token after each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engines.errors import OptionError
from export.tune.conversations import Conversation
from runtime.language.prompt import PromptWriter, Turn

IGNORED = -100
"""Target of a position that nothing is learned from."""


@dataclass(frozen=True)
class TrainingText:
    """One conversation without its picture.

    Attributes:
        before: ids in front of the picture.
        ids: ids behind it.
        targets: what follows each of them where that belongs to an answer, else `IGNORED`.
    """

    before: tuple[int, ...]
    ids: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One picture and conversations about it.

    Attributes:
        image: the picture's file.
        texts: at least one.
    """

    image: str
    texts: tuple[TrainingText, ...]


def write_text(writer: PromptWriter, conversation: Conversation) -> TrainingText:
    """Turn a conversation into ids and targets.

    Raises:
        OptionError: the chat template writes a question differently once it is answered.
    """
    turns: list[Turn] = []
    spans: list[tuple[int, list[int]]] = []
    for number, (question, answer) in enumerate(conversation.rounds):
        turns.append(Turn("user", question, images=int(number == 0)))
        prompt = writer.ids(turns).tolist()
        turns.append(Turn("assistant", answer))
        told = writer.ids(turns, answer=False).tolist()
        if told[: len(prompt)] != prompt:
            raise OptionError(
                f"{conversation.name}: the checkpoint's chat template writes the question "
                "differently once it is answered, so the answer cannot be told from it. Tuning "
                "needs a template that only appends."
            )
        spans.append((len(prompt), _answer_ids(writer, told[len(prompt) :])))
    ids, targets = told, [IGNORED] * len(told)
    for start, answer_ids in spans:
        targets[start - 1 : start + len(answer_ids) - 1] = answer_ids
    place = ids.index(writer.image_token_id)
    end = max(at for at, target in enumerate(targets) if target != IGNORED) + 1
    return TrainingText(
        tuple(ids[:place]), tuple(ids[place + 1 : end]), tuple(targets[place + 1 : end])
    )


def _answer_ids(writer: PromptWriter, written: list[int]) -> list[int]:
    """Return an answer's ids and one stop token, whatever the template puts behind an answer."""
    stops = [at for at, token in enumerate(written) if token in writer.stop_token_ids]
    if stops:
        return written[: stops[0] + 1]
    while written and not writer.tokenizer.decode(written[-1:]).strip():
        written = written[:-1]
    return [*written, writer.stop_token_ids[0]]


def fit_text(text: TrainingText, room: int) -> TrainingText | None:
    """Leave out the last rounds of a conversation until it fits; None if no round fits.

    Args:
        text: the conversation.
        room: positions the context has for it, without the picture.
    """
    length = room - len(text.before)
    if len(text.ids) <= length:
        return text
    ends = [
        at + 1
        for at, target in enumerate(text.targets[: max(length, 0)])
        if target != IGNORED and text.targets[at + 1] == IGNORED
    ]
    return (
        TrainingText(text.before, text.ids[: ends[-1]], text.targets[: ends[-1]]) if ends else None
    )


def group_rows(texts: Iterable[tuple[str, TrainingText]], longest: int) -> list[Row]:
    """Put the conversations about one picture into rows.

    Args:
        texts: (picture, conversation).
        longest: most ids behind the picture in one row.
    """
    by_image: dict[tuple[str, tuple[int, ...]], list[TrainingText]] = {}
    for image, text in texts:
        by_image.setdefault((image, text.before), []).append(text)
    rows = []
    for (image, _), mine in by_image.items():
        taken: list[TrainingText] = []
        for text in mine:
            if taken and sum(len(one.ids) for one in taken) + len(text.ids) > longest:
                rows.append(Row(image, tuple(taken)))
                taken = []
            taken.append(text)
        rows.append(Row(image, tuple(taken)))
    return rows


def count_targets(rows: Sequence[Row]) -> int:
    """Return how many ids of these rows are learned from."""
    return sum(target != IGNORED for row in rows for text in row.texts for target in text.targets)
