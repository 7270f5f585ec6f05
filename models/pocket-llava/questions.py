"""What can be asked about a layout, and the right answer.

Objects enter, questions with answers leave. Ambiguous layouts are not asked about, and choices
are weighted so that no type can be answered by always saying the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from layout import (
    COLORS,
    CORRIDOR_BLOCKED,
    CORRIDOR_CLEAR,
    IMAGE_SIZE,
    KIND_COUNT,
    SHAPES,
    SceneObject,
)

NUMBERS = ("zero", "one", "two", "three", "four")
PLURALS = ("balls", "boxes", "cones", "cylinders")
MIN_GAP_X = 12.0
MIN_GAP_Y = 8.0

Objects = Sequence[SceneObject]


@dataclass(frozen=True)
class Question:
    """A question as a user types it, its answer, and its type (a key of `TYPES`)."""

    type: str
    text: str
    answer: str


Answered = tuple[str, str] | None
Scene = TypeVar("Scene")  # what questions of a kind are about
Types = Mapping[str, Callable[[Scene, np.random.Generator], Answered]]


def phrase(rng: np.random.Generator, *wordings: str) -> str:
    """Take the first wording mostly, and another one now and then."""
    if len(wordings) == 1 or rng.random() < 0.6:
        return wordings[0]
    return wordings[1 + int(rng.integers(len(wordings) - 1))]


def _pick(rng: np.random.Generator, items: Sequence[SceneObject]) -> SceneObject:
    return items[int(rng.integers(len(items)))]


def _side(item: SceneObject) -> str | None:
    position = item.x / IMAGE_SIZE
    if position < 0.32:
        return "left"
    if position > 0.68:
        return "right"
    return "center" if 0.40 < position < 0.60 else None


def _ask_color(objects: Objects, rng: np.random.Generator) -> Answered:
    shapes = [item.shape for item in objects]
    single = [item for item in objects if shapes.count(item.shape) == 1]
    if not single:
        return None
    item = _pick(rng, single)
    return f"What color is the {SHAPES[item.shape]}?", COLORS[item.color]


def _ask_shape(objects: Objects, rng: np.random.Generator) -> Answered:
    colors = [item.color for item in objects]
    single = [item for item in objects if colors.count(item.color) == 1]
    if not single:
        return None
    item = _pick(rng, single)
    return f"What shape is the {COLORS[item.color]} object?", SHAPES[item.shape]


def _ask_count(objects: Objects, rng: np.random.Generator) -> Answered:
    text = phrase(rng, "How many objects are there?", "How many objects do you see?")
    return text, NUMBERS[len(objects)]


def _ask_exists(objects: Objects, rng: np.random.Generator) -> Answered:
    """Ask about an object that is there, or mostly about one that shares its colour or shape."""
    kinds = {item.kind for item in objects}
    present = _pick(rng, objects)
    answer, kind = "yes", present.kind
    if rng.random() < 0.5:
        same_color = [present.color * len(SHAPES) + shape for shape in range(len(SHAPES))]
        same_shape = [color * len(SHAPES) + present.shape for color in range(len(COLORS))]
        near = [kind for kind in same_color + same_shape if kind not in kinds]
        far = [kind for kind in range(KIND_COUNT) if kind not in kinds]
        choices = near if near and rng.random() < 0.8 else far
        answer, kind = "no", choices[int(rng.integers(len(choices)))]
    name = SceneObject(kind, 0, 0, 0).name
    return phrase(rng, f"Is there a {name}?", f"Do you see a {name}?"), answer


def _ask_where(objects: Objects, rng: np.random.Generator) -> Answered:
    sides = {_side(item) for item in objects} - {None}
    if not sides:
        return None
    # The centre is rarer, because clear corridors are drawn often: mostly take it when it is there.
    if "center" in sides and rng.random() < 0.75:
        side = "center"
    else:
        side = sorted(map(str, sides))[int(rng.integers(len(sides)))]
    item = _pick(rng, [item for item in objects if _side(item) == side])
    return f"Where is the {item.name}?", side


def _ask_left_of(objects: Objects, rng: np.random.Generator) -> Answered:
    row = sorted(objects, key=lambda item: item.x)
    if len(row) < 2 or row[1].x - row[0].x < MIN_GAP_X:
        return None
    if len(row) > 2 and row[2].x - row[1].x < MIN_GAP_X:
        return None
    if rng.random() < 0.25:
        return f"What is left of the {row[0].name}?", "nothing"
    return f"What is left of the {row[1].name}?", row[0].name


def _ask_nearest(objects: Objects, rng: np.random.Generator) -> Answered:
    near_first = sorted(objects, key=lambda item: -item.base_y)
    if len(near_first) < 2 or near_first[0].base_y - near_first[1].base_y < MIN_GAP_Y:
        return None
    text = phrase(rng, "What is the nearest object?", "What object is nearest?")
    return text, near_first[0].name


def _ask_count_shape(objects: Objects, rng: np.random.Generator) -> Answered:
    """Ask for the number of one shape, the rarer numbers more often."""
    counts = [sum(item.shape == shape for item in objects) for shape in range(len(SHAPES))]
    weights = np.array([(0.25, 0.5, 1.6, 4.0, 6.0)[count] for count in counts])
    shape = int(rng.choice(len(SHAPES), p=weights / weights.sum()))
    text = phrase(
        rng, f"How many {PLURALS[shape]} are there?", f"How many {PLURALS[shape]} do you see?"
    )
    return text, NUMBERS[counts[shape]]


def _ask_path(objects: Objects, rng: np.random.Generator) -> Answered:
    offsets = [abs(item.x / IMAGE_SIZE - 0.5) for item in objects]
    text = phrase(rng, "Is the path clear?", "Is the path ahead clear?")
    if min(offsets) < CORRIDOR_BLOCKED:
        return text, "no"
    return (text, "yes") if min(offsets) > CORRIDOR_CLEAR else None


def _ask_list(objects: Objects, rng: np.random.Generator) -> Answered:
    row = sorted(objects, key=lambda item: item.x)
    if any(right.x - left.x < MIN_GAP_X for left, right in pairwise(row)):
        return None
    text = phrase(
        rng, "What do you see from left to right?", "What do you see?", "List the objects."
    )
    return text, ", ".join(item.name for item in row)


TYPES: Types[Objects] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "exists": _ask_exists,
    "where": _ask_where,
    "left_of": _ask_left_of,
    "nearest": _ask_nearest,
    "count_shape": _ask_count_shape,
    "path": _ask_path,
    "list": _ask_list,
}


def ask(
    type_name: str, scene: Scene, rng: np.random.Generator, types: Types[Scene]
) -> Question | None:
    """Ask one question of a type, or return None where the scene would make it ambiguous."""
    answered = types[type_name](scene, rng)
    return None if answered is None else Question(type_name, *answered)


def ask_of_each(scene: Scene, rng: np.random.Generator, types: Types[Scene]) -> list[Question]:
    """Ask one question of every one of `types` that this scene allows."""
    asked = (ask(type_name, scene, rng, types) for type_name in types)
    return [question for question in asked if question is not None]


def ask_each_type(objects: Objects, rng: np.random.Generator) -> list[Question]:
    """Ask one question of every type that this layout allows."""
    return ask_of_each(objects, rng, TYPES)


def choose_questions(
    scene: Scene,
    count: int,
    type_weights: Mapping[str, float],
    rng: np.random.Generator,
    types: Types[Scene],
) -> list[Question]:
    """Ask up to `count` different questions, types drawn by their weights (1 if not named)."""
    weights = np.array([type_weights.get(name, 1.0) for name in types])
    names = rng.choice(list(types), size=2 * count, p=weights / weights.sum())
    chosen: dict[str, Question] = {}
    for name in names:
        question = ask(str(name), scene, rng, types)
        if question is not None:
            chosen.setdefault(question.text, question)
        if len(chosen) == count:
            break
    return list(chosen.values())
