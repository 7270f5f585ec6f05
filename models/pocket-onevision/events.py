"""Clips of 8 frames in which objects move, enter or leave, one before the other, and what to ask.

A seed enters; frames and questions leave, the same ones every time. The camera pans a little.

    python models/pocket-onevision/events.py --seed 3 --count 20 --out DIR

writes `DIR/00000/00.png ...` and `DIR/questions.jsonl`. Frames are as large as a tile.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import paths  # noqa: F401 - makes pocket-llava's modules importable

import numpy as np  # isort: skip
from clips import EVENTS, FRAMES, pan_object
from layout import IMAGE_SIZE, KIND_COUNT, PATCH_SIZE, Layout, SceneObject, draw_layout
from pictures import shrink
from PIL import Image
from questions import Answered, Question, Types, ask_of_each, phrase
from scenes import draw_backdrop, label_patches, render
from written_dataset import run_writer

LANES = (188.0, 156.0)  # where actors stand, in pixels from the top: near and farther
POOLED_GRID = 6  # tokens a frame is wide
_FAR = 128.0  # everything else stands beyond this
_PAN = 10.0  # pixels the nearest floor shifts over a clip, at most
_DURATION = 0.43  # of an event, in clip lengths; one is over before the next begins


@dataclass(frozen=True)
class Event:
    """What an actor does: the kind of object, an index into `EVENTS`, and in which half."""

    kind: int
    event: int
    late: bool

    @property
    def name(self) -> str:
        """What the actor is called, such as "red ball"."""
        return SceneObject(self.kind, 0, 0, 0).name


@dataclass(frozen=True)
class EventClip:
    """A clip, what happens in it in order of time, and what each pooled patch shows.

    Attributes:
        frames: uint8[FRAMES, 96, 96, 3].
        events: of the actors; "nothing" is none. Two that act do so in different halves.
        layouts: what is in each frame, in pixels of the picture before it was shrunk.
        labels: int8[FRAMES, 36], the number of an object that a pooled patch shows, or 0.
    """

    frames: np.ndarray
    events: tuple[Event, ...]
    layouts: tuple[Layout, ...]
    labels: np.ndarray


def _draw_events(rng: np.random.Generator, kinds: list[int]) -> tuple[Event, ...]:
    """Draw what two actors do, earlier first; about one in nine clips has nothing happen."""
    first, second = (int(event) for event in rng.choice(len(EVENTS), 2, p=(0.22, 0.22, 0.22, 0.34)))
    nothing = len(EVENTS) - 1
    late = bool(rng.random() < 0.5) if second == nothing else False
    both = nothing not in (first, second)
    return (
        Event(kinds[0], first, late and not both),
        Event(kinds[1], second, both or bool(rng.random() < 0.5)),
    )


def _place_at(event: Event, x: float, distance: float, time: float) -> float:
    """Return an actor's x at a time, 0 to 1. Beyond the edge it is out of sight."""
    inward = 1.0 if x < IMAGE_SIZE / 2 else -1.0
    outside = IMAGE_SIZE / 2 - inward * (IMAGE_SIZE / 2 + 50)
    done = float(np.clip((time - (0.57 if event.late else 0.0)) / _DURATION, 0, 1))
    name = EVENTS[event.event]
    if name == "moved":
        return x + inward * distance * done
    if name == "entered":
        return outside + (x - outside) * done
    return x + (outside - x) * done if name == "left" else x


def generate_event_clip(seed: int, index: int) -> EventClip:
    """Generate clip `index` of a seed, independent of the others."""
    rng = np.random.default_rng((seed, index, 5))
    still = draw_layout(rng)
    background = [item for item in still.objects if item.base_y < _FAR]
    present = {item.kind for item in background}
    absent = [kind for kind in rng.permutation(KIND_COUNT) if kind not in present]
    events = _draw_events(rng, [int(kind) for kind in absent[:2]])
    lanes = rng.permutation(LANES)
    places = rng.uniform(28, IMAGE_SIZE - 28, 2)
    distances = rng.uniform(60, 90, 2)
    pan = float(rng.uniform(-_PAN, _PAN))
    backdrop = draw_backdrop(rng)
    tint_seed = int(rng.integers(2**31))
    frames, layouts, labels = [], [], []
    for time in np.linspace(0, 1, FRAMES):
        objects = list(background)
        for event, lane, place, distance in zip(events, lanes, places, distances, strict=True):
            x = _place_at(event, float(place), float(distance), float(time))
            objects.append(SceneObject(event.kind, x, float(lane), 13.5))
        objects = [pan_object(item, still.horizon, pan * float(time)) for item in objects]
        whole = Layout(still.horizon, tuple(objects))
        # The same tints and the same noise in every frame.
        frame_rng = np.random.default_rng(tint_seed)
        image, owner = render(whole, backdrop, frame_rng, pan * float(time))
        frames.append(shrink(image))
        layouts.append(replace(whole, objects=tuple(item for item in objects if _is_seen(item))))
        labels.append(_pool_labels(owner))
    return EventClip(np.stack(frames), events, tuple(layouts), np.stack(labels))


def _is_seen(item: SceneObject) -> bool:
    return -10 < item.x < IMAGE_SIZE + 10


def _pool_labels(owner: np.ndarray) -> np.ndarray:
    """Return int8[36]: the number of an object that one of the four patches shows, or 0."""
    labels = label_patches(owner, 2 * PATCH_SIZE, part=8).clip(min=0)
    split = labels.reshape(POOLED_GRID, 2, POOLED_GRID, 2)
    pooled: np.ndarray = split.max((1, 3)).reshape(-1)
    return pooled


def _ask_what(event: str, events: tuple[Event, ...], rng: np.random.Generator) -> Answered:
    """Ask who moved, entered or left, unless two did."""
    names = [item.name for item in events if EVENTS[item.event] == event]
    if len(names) > 1:
        return None
    if not names and rng.random() < 0.7:
        return None  # "nothing" is the commonest answer
    return f"What {event}?", names[0] if names else "nothing"


def _in_order(events: tuple[Event, ...]) -> list[str]:
    acting = sorted((item.late, item) for item in events if EVENTS[item.event] != "nothing")
    return [f"{item.name} {EVENTS[item.event]}" for _, item in acting]


def _ask_first(events: tuple[Event, ...], rng: np.random.Generator) -> Answered:
    happened = _in_order(events)
    return ("What happened first?", happened[0]) if len(happened) == 2 else None


def _ask_order(events: tuple[Event, ...], rng: np.random.Generator) -> Answered:
    text = phrase(rng, "What happened?", "What happened in this clip?")
    return text, ", ".join(_in_order(events)) or "nothing"


def _ask_moved(events: tuple[Event, ...], rng: np.random.Generator) -> Answered:
    return _ask_what("moved", events, rng)


def _ask_entered(events: tuple[Event, ...], rng: np.random.Generator) -> Answered:
    return _ask_what("entered", events, rng)


def _ask_left(events: tuple[Event, ...], rng: np.random.Generator) -> Answered:
    return _ask_what("left", events, rng)


CLIP_TYPES: Types[tuple[Event, ...]] = {
    "clip_moved": _ask_moved,
    "clip_entered": _ask_entered,
    "clip_left": _ask_left,
    "clip_first": _ask_first,
    "clip_order": _ask_order,
}


def ask_about_clip(events: tuple[Event, ...], seed: int, index: int) -> list[Question]:
    """Return the held-out questions about clip `index` of a seed."""
    return ask_of_each(events, np.random.default_rng((seed, index, 6)), CLIP_TYPES)


def write_clips(seed: int, count: int, out: Path) -> int:
    """Write `count` clips and their questions under `out`; return the number of questions."""
    rows: list[str] = []
    for index in range(count):
        clip = generate_event_clip(seed, index)
        folder = out / f"{index:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(clip.frames):
            Image.fromarray(frame).save(folder / f"{number:02d}.png", optimize=True)
        for question in ask_about_clip(clip.events, seed, index):
            row = {"clip": folder.name, "question": question.text, "answer": question.answer}
            rows.append(json.dumps({**row, "type": question.type}))
    (out / "questions.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    raise SystemExit(run_writer(__doc__, write_clips, "clips", count=500))
