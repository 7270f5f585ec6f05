"""Short clips of a scene seen by a camera that pans, in which one object moves, enters or leaves.

    python models/pocket-llava/clips.py --seed 3 --count 20 --out DIR

A seed enters; frames and questions with answers leave: `DIR/00000/00.png ...` and
`DIR/questions.jsonl`. The checkpoint was trained on single pictures only; clips are for measuring
what a runtime makes of video.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from layout import IMAGE_SIZE, KIND_COUNT, Layout, SceneObject, draw_layout
from questions import Question
from scenes import draw_backdrop, render

EVENTS = ("moved", "entered", "left", "nothing")
FRAMES = 8
_PAN = 16.0  # pixels the nearest floor shifts over a clip, at most


@dataclass(frozen=True)
class Clip:
    """Frames uint8[F, S, S, 3], what is in each of them, and questions about the whole."""

    frames: np.ndarray
    layouts: tuple[Layout, ...]
    event: str
    questions: tuple[Question, ...]


def _path_of(event: str, rng: np.random.Generator, x: float) -> Callable[[float], float]:
    """Return the actor's x as a function of time, 0 to 1. Beyond the edge it is out of sight."""
    inward = 1.0 if x < IMAGE_SIZE / 2 else -1.0
    outside = IMAGE_SIZE / 2 - inward * (IMAGE_SIZE / 2 + 40)
    if event == "moved":
        distance = inward * float(rng.uniform(45, 70))
        return lambda time: x + distance * time
    if event == "entered":
        return lambda time: outside + (x - outside) * min(1.0, 1.3 * time)
    if event == "left":
        return lambda time: x + (outside - x) * max(0.0, 1.3 * time - 0.3)
    return lambda time: x


def generate_clip(seed: int, index: int, frames: int = FRAMES) -> Clip:
    """Generate clip `index` of a seed, independent of the others."""
    rng = np.random.default_rng((seed, index, 2))
    event = EVENTS[int(rng.integers(len(EVENTS)))]
    still = draw_layout(rng)
    present = {item.kind for item in still.objects}
    absent = [kind for kind in range(KIND_COUNT) if kind not in present]
    # The actor is one more object, on the floor in front of the others.
    x = float(rng.uniform(30, IMAGE_SIZE - 30))
    actor = SceneObject(int(rng.choice(absent)), x, IMAGE_SIZE - 3.0, 13.5)
    follow = _path_of(event, rng, x)
    pan = float(rng.uniform(-_PAN, _PAN))
    backdrop = draw_backdrop(rng)
    tint_seed = int(rng.integers(2**31))
    layouts, pictures = [], []
    for time in np.linspace(0, 1, frames):
        moved = replace(actor, x=follow(float(time)))
        objects = [pan_object(item, still.horizon, pan * time) for item in still.objects]
        objects.append(pan_object(moved, still.horizon, pan * time))
        visible = tuple(item for item in objects if -15 < item.x < IMAGE_SIZE + 15)
        layouts.append(Layout(still.horizon, visible))
        # The same tints in every frame, and noise that depends on them alone: enough for a test.
        frame_rng = np.random.default_rng(tint_seed)
        pictures.append(render(layouts[-1], backdrop, frame_rng, pan * float(time))[0])
    return Clip(np.stack(pictures), tuple(layouts), event, _ask(event, actor.name))


def pan_object(item: SceneObject, horizon: float, pan: float) -> SceneObject:
    """Displace an object as the camera pans; near ones more."""
    nearness = (item.base_y - horizon) / (IMAGE_SIZE - horizon)
    return replace(item, x=item.x + pan * (0.5 + 0.5 * nearness))


def _ask(event: str, name: str) -> tuple[Question, ...]:
    return tuple(
        Question(f"clip_{kind}", f"What {kind}?", name if event == kind else "nothing")
        for kind in EVENTS[:-1]
    )


def main() -> int:
    """Read the command line and write clips."""
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "questions.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(options.count):
            clip = generate_clip(options.seed, index)
            folder = options.out / f"{index:05d}"
            folder.mkdir(exist_ok=True)
            for number, frame in enumerate(clip.frames):
                Image.fromarray(frame).save(folder / f"{number:02d}.png")
            for question in clip.questions:
                row = {"clip": folder.name, "question": question.text, "answer": question.answer}
                lines.write(json.dumps({**row, "type": question.type}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
