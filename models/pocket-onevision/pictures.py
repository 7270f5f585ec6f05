"""Pictures of four tiles: pocket-llava's scenes with small signs, and what to ask about them.

A seed enters; pictures, patch labels and questions leave, the same ones every time.

    python models/pocket-onevision/pictures.py --seed 7 --count 1000 --out DIR

writes `DIR/*.png` and `DIR/questions.jsonl` (one object a line: image, question, answer, type).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import paths  # noqa: F401 - makes pocket-llava's modules importable

import numpy as np  # isort: skip
from layout import COLORS, MAX_OBJECTS_DENSE, PATCH_SIZE, SceneObject, draw_layout
from PIL import Image
from questions import NUMBERS, TYPES, Answered, Question, Types, ask_of_each, phrase
from scenes import add_grain, draw_backdrop, label_patches, paint_scene
from signs import PATTERNS, TILE_SIZE, Sign, draw_signs, paint_sign
from written_dataset import run_writer

# Seeds of the splits. Training seeds add their own number times SEED_STRIDE of pocket-llava.
TRAIN_SEED = 5_000_000
VALIDATION_SEED = 5_077
TEST_SEED = 20_261_121


@dataclass(frozen=True)
class PictureScene:
    """What a picture shows: objects far to near, and signs. A sign is not called an object."""

    objects: tuple[SceneObject, ...]
    signs: tuple[Sign, ...]


@dataclass(frozen=True)
class Picture:
    """A picture, what it shows, and what each patch shows.

    Attributes:
        scene: what is in it.
        image: uint8[192, 192, 3].
        labels: int8[576], see `scenes.label_patches`; objects are numbered from 1, signs from 9.
        base_labels: int8[144], the same for the patches of the picture at half its size.
    """

    scene: PictureScene
    image: np.ndarray
    labels: np.ndarray
    base_labels: np.ndarray


def generate_picture(seed: int, index: int, dense: bool = False) -> Picture:
    """Generate picture `index` of a seed, whatever the others are.

    Args:
        seed: of a split.
        index: which one.
        dense: up to 8 objects, for training the tower, rather than 1 to 4.
    """
    rng = np.random.default_rng((seed, index, 3))
    layout = draw_layout(rng, dense)
    scene = PictureScene(layout.objects, draw_signs(rng, layout.objects))
    backdrop = draw_backdrop(rng)
    painted, owner = paint_scene(layout, backdrop, rng)
    for number, sign in enumerate(scene.signs, start=MAX_OBJECTS_DENSE + 1):
        paint_sign(painted, owner, sign, number, rng)
    return Picture(
        scene,
        add_grain(painted, backdrop, rng),
        label_patches(owner),
        label_patches(owner, 2 * PATCH_SIZE, part=8),
    )


def shrink(image: np.ndarray) -> np.ndarray:
    """Return a picture at the size of a tile, as the checkpoint's image processor does."""
    picture = Image.fromarray(image).resize((TILE_SIZE, TILE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _ask_sign_pattern(scene: PictureScene, rng: np.random.Generator) -> Answered:
    if not scene.signs:
        return None
    sign = scene.signs[int(rng.integers(len(scene.signs)))]
    text = f"What is on the {COLORS[sign.color]} sign?"
    return text, PATTERNS[sign.pattern]


def _ask_sign_color(scene: PictureScene, rng: np.random.Generator) -> Answered:
    patterns = [sign.pattern for sign in scene.signs]
    single = [sign for sign in scene.signs if patterns.count(sign.pattern) == 1]
    if not single:
        return None
    sign = single[int(rng.integers(len(single)))]
    return f"What color is the sign with {PATTERNS[sign.pattern]}?", COLORS[sign.color]


def _ask_sign_exists(scene: PictureScene, rng: np.random.Generator) -> Answered:
    """Ask about a sign that is there, or about the same colour with another pattern."""
    if not scene.signs:
        return None
    sign = scene.signs[int(rng.integers(len(scene.signs)))]
    answer, pattern = "yes", sign.pattern
    if rng.random() < 0.5:
        others = [other for other in range(len(PATTERNS)) if other != pattern]
        answer, pattern = "no", others[int(rng.integers(len(others)))]
    name = Sign(sign.color, pattern, 0, 0).name
    return phrase(rng, f"Is there a {name}?", f"Do you see a {name}?"), answer


def _ask_sign_count(scene: PictureScene, rng: np.random.Generator) -> Answered:
    text = phrase(rng, "How many signs are there?", "How many signs do you see?")
    return text, NUMBERS[len(scene.signs)]


def _ask_sign_count_pattern(scene: PictureScene, rng: np.random.Generator) -> Answered:
    """Ask for the number of signs with a pattern, the rarer numbers more often."""
    counts = [sum(s.pattern == pattern for s in scene.signs) for pattern in range(len(PATTERNS))]
    weights = np.array([(0.25, 0.6, 1.8, 4.0, 8.0)[count] for count in counts])
    pattern = int(rng.choice(len(PATTERNS), p=weights / weights.sum()))
    return f"How many signs have {PATTERNS[pattern]}?", NUMBERS[counts[pattern]]


def _about_objects(
    ask: Callable[[tuple[SceneObject, ...], np.random.Generator], Answered],
    scene: PictureScene,
    rng: np.random.Generator,
) -> Answered:
    return ask(scene.objects, rng)


# The types whose answer can be read in a tile alone.
TILE_TYPES = ("sign_pattern", "sign_color", "sign_exists", "sign_count_pattern")

PICTURE_TYPES: Types[PictureScene] = {
    **{name: partial(_about_objects, ask) for name, ask in TYPES.items()},
    "sign_pattern": _ask_sign_pattern,
    "sign_color": _ask_sign_color,
    "sign_exists": _ask_sign_exists,
    "sign_count": _ask_sign_count,
    "sign_count_pattern": _ask_sign_count_pattern,
}


def ask_about(picture: Picture, seed: int, index: int) -> list[Question]:
    """Return the held-out questions about picture `index` of a seed."""
    return ask_of_each(picture.scene, np.random.default_rng((seed, index, 4)), PICTURE_TYPES)


def write_pictures(seed: int, count: int, out: Path) -> int:
    """Write `count` pictures and their questions under `out`; return the number of questions."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[str] = []
    for index in range(count):
        picture = generate_picture(seed, index)
        name = f"{index:05d}.png"
        Image.fromarray(picture.image).save(out / name, optimize=True)
        for question in ask_about(picture, seed, index):
            row = {"image": name, "question": question.text, "answer": question.answer}
            rows.append(json.dumps({**row, "type": question.type}))
    (out / "questions.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    raise SystemExit(run_writer(__doc__, write_pictures, "pictures"))
