"""Rendered robot-camera scenes: a wall, a textured floor in perspective, and 1 to 4 small objects.

A seed enters; pictures, patch labels and questions leave, the same ones every time. Rendering is
numpy alone; Pillow only writes the PNGs.

    python models/pocket-llava/scenes.py --seed 7 --count 1000 --out DIR

writes `DIR/*.png` and `DIR/questions.jsonl` (one object a line: image, question, answer, type).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from layout import (
    GRID_SIZE,
    IMAGE_SIZE,
    PATCH_SIZE,
    Layout,
    SceneObject,
    draw_layout,
)
from PIL import Image
from questions import ask_each_type
from written_dataset import run_writer

# Seeds of the splits. Training seeds add their own number times SEED_STRIDE to the first.
TRAIN_SEED = 1_000_000
VALIDATION_SEED = 77
TEST_SEED = 20_260_711
SEED_STRIDE = 100_000

OBJECT_RGB = np.array(
    [[200, 35, 35], [35, 150, 50], [40, 70, 205], [220, 200, 40], [140, 45, 170]], np.float32
)
_ROWS, _COLUMNS = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
_UNSURE = -100


@dataclass(frozen=True)
class Backdrop:
    """Everything behind the objects, drawn once so that the frames of a clip share it."""

    wall_rgb: np.ndarray
    floor_rgb: np.ndarray
    pattern: int
    pattern_scale: tuple[float, float]
    pattern_phase: float
    pattern_strength: float
    blotches: np.ndarray
    light_slope: tuple[float, float]
    panels: tuple[tuple[float, float, float, float, float], ...]
    noise: float


def draw_backdrop(rng: np.random.Generator) -> Backdrop:
    """Draw wall, floor, texture, light, noise level and the flat panels that distract."""
    panels = tuple(
        (
            float(rng.uniform(0, IMAGE_SIZE - 20)),
            float(rng.uniform(0, 70)),
            float(rng.uniform(12, 50)),
            float(rng.uniform(12, 60)),
            float(rng.uniform(0.65, 1.2)),
        )
        for _ in range(int(rng.integers(0, 4)))
    )
    return Backdrop(
        wall_rgb=(rng.uniform(90, 215) + rng.uniform(-20, 20, 3)).astype(np.float32),
        floor_rgb=(rng.uniform(60, 190) + rng.uniform(-20, 20, 3)).astype(np.float32),
        pattern=int(rng.integers(4)),
        pattern_scale=(float(rng.uniform(6, 14)), float(rng.uniform(350, 850))),
        pattern_phase=float(rng.uniform(0, 6)),
        pattern_strength=float(rng.uniform(5, 24)),
        blotches=rng.standard_normal((GRID_SIZE, GRID_SIZE + 8)).astype(np.float32),
        light_slope=(float(rng.uniform(-0.25, 0.25)), float(rng.uniform(-0.25, 0.25))),
        panels=panels,
        noise=float(rng.uniform(2, 11)),
    )


def _floor_texture(backdrop: Backdrop, horizon: float, shift: float) -> np.ndarray:
    """Return the floor's brightness pattern, `float32[rows below the horizon, IMAGE_SIZE]`."""
    top = int(np.ceil(horizon))
    depth = 1.0 / np.maximum(_ROWS[top:] - horizon + 9, 1)
    across = (_COLUMNS[top:] - IMAGE_SIZE / 2 - shift) * depth * backdrop.pattern_scale[0]
    away = depth[:, :1] * backdrop.pattern_scale[1] + backdrop.pattern_phase
    if backdrop.pattern == 0:
        texture = ((np.floor(across) + np.floor(away)) % 2) - 0.5
    elif backdrop.pattern == 1:
        texture = (np.floor(across) % 2) - 0.5
    elif backdrop.pattern == 2:
        texture = np.sin(across * 2 + np.sin(away))
    else:
        start = 4 - int(np.clip(round(shift / PATCH_SIZE), -4, 4))
        coarse = backdrop.blotches[:, start : start + GRID_SIZE]
        texture = 0.6 * np.repeat(np.repeat(coarse, PATCH_SIZE, 0), PATCH_SIZE, 1)[top:]
    return np.asarray(texture * backdrop.pattern_strength, np.float32)


def paint_backdrop(backdrop: Backdrop, horizon: float, shift: float = 0.0) -> np.ndarray:
    """Paint wall and floor, `float32[IMAGE_SIZE, IMAGE_SIZE, 3]`, seen `shift` pixels aside."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    top = int(np.ceil(horizon))
    image[:top] = backdrop.wall_rgb
    image[top:] = backdrop.floor_rgb + _floor_texture(backdrop, horizon, shift)[..., None]
    for x, y, width, height, brightness in backdrop.panels:
        left = int(max(0, x + 0.4 * shift))
        right = int(max(0, x + width + 0.4 * shift))
        image[int(y) : min(top, int(y + height)), left:right] *= brightness
    image[max(0, top - 1) : top + 1] *= 0.7
    slope_x, slope_y = backdrop.light_slope
    across, down = _COLUMNS[:1] / IMAGE_SIZE - 0.5, _ROWS[:, :1] / IMAGE_SIZE - 0.5
    light = 1 + slope_x * across + slope_y * down
    image *= light[..., None]
    return image


def _shade_ball(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    square = u * u + v * v
    bulge = np.sqrt(np.clip(1 - square, 0, 1))
    return square < 1, 0.45 + 0.6 * np.clip(-0.4 * u - 0.6 * v + 0.7 * bulge, 0, 1.2)


def _shade_box(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    front = (u > -0.9) & (u < 0.55) & (v > -0.45) & (v < 0.95)
    rise = -0.45 - v
    lid = (rise >= 0) & (rise < 0.5) & (u - rise * 0.7 > -0.9) & (u - rise * 0.7 < 0.55)
    reach = u - 0.55
    side = (reach >= 0) & (reach < 0.35) & (v + reach * 1.4 > -0.45) & (v + reach * 1.4 < 0.95)
    return front | lid | side, np.where(front, 0.85, np.where(lid, 1.15, 0.55))


def _shade_cone(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half_width = 0.85 * (v + 1) / 1.8
    body = (v < 0.8) & (np.abs(u) < half_width)
    foot = (u / 0.85) ** 2 + ((v - 0.8) / 0.18) ** 2 < 1
    return body | foot, 0.95 - 0.45 * np.clip(u / np.maximum(half_width, 0.1), -1, 1)


def _shade_cylinder(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    body = (np.abs(u) < 0.62) & (v > -0.78) & (v < 0.8)
    foot = (u / 0.62) ** 2 + ((v - 0.8) / 0.18) ** 2 < 1
    lid = (u / 0.62) ** 2 + ((v + 0.78) / 0.2) ** 2 < 1
    return body | foot | lid, np.where(lid, 1.2, 0.9 - 0.4 * (u / 0.62))


_SHADERS = (_shade_ball, _shade_box, _shade_cone, _shade_cylinder)


def paint_object(
    image: np.ndarray, owner: np.ndarray, item: SceneObject, rgb: np.ndarray, number: int
) -> None:
    """Paint one object and its shadow into `image`, and its number into `owner`, in place."""
    radius, center_y = item.radius, item.center_y
    top, bottom = max(0, int(center_y - 1.3 * radius)), int(center_y + 1.5 * radius) + 1
    left, right = max(0, int(item.x - 1.4 * radius)), int(item.x + 1.6 * radius) + 1
    area = image[top:bottom, left:right]
    u = (_COLUMNS[top:bottom, left:right] - item.x) / radius
    v = (_ROWS[top:bottom, left:right] - center_y) / radius
    shadow = ((u - 0.25) / 1.15) ** 2 + ((v - 0.9) / 0.3) ** 2 < 1
    area[shadow] *= 0.6
    mask, shade = _SHADERS[item.shape](u, v)
    area[mask] = rgb * shade[mask][:, None]
    owner[top:bottom, left:right][mask] = number


def paint_scene(
    layout: Layout, backdrop: Backdrop, rng: np.random.Generator, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Paint a layout without sensor noise.

    Args:
        layout: the objects, far to near.
        backdrop: what is behind them.
        rng: draws the objects' tints.
        shift: how far the far wall's view is displaced, for clips; objects are already displaced.

    Returns:
        image: float32[IMAGE_SIZE, IMAGE_SIZE, 3] RGB, 0 to 255 and a little beyond.
        owner: int16[IMAGE_SIZE, IMAGE_SIZE], 1 + the object's index in the layout, or 0.
    """
    image = paint_backdrop(backdrop, layout.horizon, shift)
    owner = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.int16)
    for number, item in enumerate(layout.objects, start=1):
        tint = (OBJECT_RGB[item.color] + rng.uniform(-18, 18, 3)) * rng.uniform(0.75, 1.15)
        paint_object(image, owner, item, tint.astype(np.float32), number)
    return image, owner


def add_grain(image: np.ndarray, backdrop: Backdrop, rng: np.random.Generator) -> np.ndarray:
    """Return a painted picture with sensor noise, uint8 of the same shape."""
    grain = rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 1), np.float32)
    noisy: np.ndarray = np.clip(image + grain * backdrop.noise, 0, 255).astype(np.uint8)
    return noisy


def render(
    layout: Layout, backdrop: Backdrop, rng: np.random.Generator, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Render a layout, see `paint_scene`.

    Returns:
        image: uint8[IMAGE_SIZE, IMAGE_SIZE, 3] RGB.
        owner: int16[IMAGE_SIZE, IMAGE_SIZE], 1 + the object's index in the layout, or 0.
    """
    image, owner = paint_scene(layout, backdrop, rng, shift)
    return add_grain(image, backdrop, rng), owner


def label_patches(owner: np.ndarray, patch_size: int = PATCH_SIZE, part: int = 4) -> np.ndarray:
    """Say which object each patch shows.

    Args:
        owner: int16[IMAGE_SIZE, IMAGE_SIZE], see `render`.
        patch_size: pixels of the picture that a patch is wide; more where it is seen smaller.
        part: an object has to cover one in so many pixels of a patch to be what it shows.

    Returns:
        int8[G ** 2] with G = IMAGE_SIZE // patch_size: 1 + the object's index where it covers a
        quarter of the patch (see `part`), 0 where there is floor or wall, -100 in between.
    """
    grid, area = IMAGE_SIZE // patch_size, patch_size**2
    split = owner.reshape(grid, patch_size, grid, patch_size)
    tiles = split.swapaxes(1, 2).reshape(grid**2, area)
    label = np.zeros(grid**2, np.int8)
    best = np.zeros(grid**2, np.int64)
    for number in range(1, int(owner.max()) + 1):
        covered = (tiles == number).sum(1)
        larger = covered > best
        label[larger], best[larger] = number, covered[larger]
    enough, trace = area // part, area // (3 * part)
    return np.where(best >= enough, label, np.where(best >= trace, _UNSURE, 0)).astype(np.int8)


def generate_scene(
    seed: int, index: int, dense: bool = False
) -> tuple[Layout, np.ndarray, np.ndarray]:
    """Return (layout, image, patch labels) of scene `index` of a seed, whatever the others are."""
    rng = np.random.default_rng((seed, index))
    layout = draw_layout(rng, dense)
    image, owner = render(layout, draw_backdrop(rng), rng)
    return layout, image, label_patches(owner)


def _palette_picture(image: np.ndarray) -> Image.Image:
    """Reduce a picture to 256 colours: a third of the bytes, an error under the sensor noise.

    The palette must cover rare colours: a median cut takes the shading off small objects.
    """
    picture = Image.fromarray(image)
    covering = Image.Quantize.MAXCOVERAGE
    return picture.quantize(256, method=covering, kmeans=2, dither=Image.Dither.NONE)


def write_dataset(seed: int, count: int, out: Path) -> int:
    """Write `count` pictures and their questions under `out`; return the number of questions."""
    out.mkdir(parents=True, exist_ok=True)
    asked = 0
    with (out / "questions.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(count):
            layout, image, _ = generate_scene(seed, index)
            name = f"{index:05d}.png"
            _palette_picture(image).save(out / name, optimize=True)
            rng = np.random.default_rng((seed, index, 1))
            for question in ask_each_type(layout.objects, rng):
                row = {
                    "image": name,
                    "question": question.text,
                    "answer": question.answer,
                    "type": question.type,
                }
                lines.write(json.dumps(row) + "\n")
                asked += 1
    return asked


if __name__ == "__main__":
    raise SystemExit(run_writer(__doc__, write_dataset, "pictures"))
