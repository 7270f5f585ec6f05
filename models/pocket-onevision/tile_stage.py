"""Stage 1: teach the tower what each patch of a tile, and of a whole picture made small, shows.

Rendered pictures enter; a trained tower leaves. Each step looks at one view of each picture of a
batch. The attention that patches receive in the layer read last is taught to lie on objects and
signs, as pocket-llava's class token was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from layout import MAX_OBJECTS_DENSE, SHAPES
from onevision import TILE_GRID, TILES, cut_views, look, normalise
from signs import MAX_SIGNS, PATTERNS, SIGN_SIZE, TILE_SIZE
from torch import Tensor, nn
from tower_stage import PatchHeads, attention_loss, patch_losses
from tower_targets import UNSURE, PatchTargets, share_attention
from training_loop import Learning, StepOutcome, run_steps
from training_state import ProgressLog, TrainingState
from view_store import PictureStore

SLOTS = MAX_OBJECTS_DENSE + MAX_SIGNS
# What a patch can show: four shapes, four patterns, and a sign too small to be read.
SHOWN = len(SHAPES) + len(PATTERNS) + 1


@dataclass(frozen=True)
class TileOptions:
    """How the tower is trained. Every step sees one view of each picture of a batch."""

    learning: Learning = field(default_factory=lambda: Learning(1_200, 1.5e-3, 0.05, 100))
    batch: int = 64
    base_share: float = 0.35
    attention_weight: float = 0.3
    attention_floor: float = 0.1  # share of the target spread over all patches, to keep floors flat
    background_weight: float = 0.25
    seed: int = 0


def describe_slots(store: PictureStore, chosen: np.ndarray) -> np.ndarray:
    """Return float32[B, 12, 4] rows of (color, shown, x, base_y), -1 where there is nothing.

    The first eight are objects, the others signs; `shown` counts shapes, then patterns.
    """
    objects, signs = np.asarray(store.objects[chosen]), np.asarray(store.signs[chosen])
    rows = np.full((len(chosen), SLOTS, 4), -1, np.float32)
    kinds, there = objects[..., 0].astype(np.int64), objects[..., 0] >= 0
    rows[:, :MAX_OBJECTS_DENSE, 0] = np.where(there, kinds // len(SHAPES), -1)
    rows[:, :MAX_OBJECTS_DENSE, 1] = np.where(there, kinds % len(SHAPES), -1)
    rows[:, :MAX_OBJECTS_DENSE, 2:] = objects[..., 1:3]
    put = signs[..., 0] >= 0
    rows[:, MAX_OBJECTS_DENSE:, 0] = signs[..., 0]
    rows[:, MAX_OBJECTS_DENSE:, 1] = np.where(put, len(SHAPES) + signs[..., 1], -1)
    rows[:, MAX_OBJECTS_DENSE:, 2] = np.where(put, signs[..., 2] + SIGN_SIZE / 2, -1)
    rows[:, MAX_OBJECTS_DENSE:, 3] = np.where(put, signs[..., 3] + SIGN_SIZE, -1)
    return rows


def draw_views(slots: np.ndarray, base_share: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a view of each picture, int64[B]: 0 the base, 1 to 4 a tile with something in it."""
    there = slots[..., 0] >= 0
    picked = (rng.random(there.shape) * there).argmax(1)
    place = slots[np.arange(len(slots)), picked, 2:]
    column, row = (np.clip(place - 4, 0, 2 * TILE_SIZE - 1) // TILE_SIZE).astype(np.int64).T
    is_base = rng.random(len(slots)) < base_share
    return np.where(is_base, 0, 1 + 2 * row + column)


def make_targets(labels: np.ndarray, slots: np.ndarray, views: np.ndarray) -> PatchTargets:
    """Derive what the tower is to say about each patch of a view.

    Args:
        labels: int8[B, 144] of the views.
        slots: float32[B, 12, 4], see `describe_slots`.
        views: int64[B], see `draw_views`.
    """
    batch = np.arange(len(labels))[:, None]
    shown = labels > 0
    numbers = np.where(shown, labels, 1).astype(np.int64) - 1
    kinds = slots[batch, numbers]  # [B, P, 4]
    what = kinds[..., 1].astype(np.int64)
    is_base = (views == 0)[:, None]
    what = np.where(is_base & (what >= len(SHAPES)), SHOWN - 1, what)
    other = np.where(labels == UNSURE, UNSURE, 0)
    tile = np.maximum(views - 1, 0)
    corner = np.stack([tile % 2, tile // 2], -1)[:, None] * TILE_SIZE
    corner = np.where(is_base[..., None], 0, corner)
    place = (kinds[..., 2:] - corner) / np.where(is_base, 2 * TILE_SIZE, TILE_SIZE)[..., None]
    attention, _ = share_attention(labels, SLOTS)
    steps = (np.arange(TILE_GRID) + 0.5) / TILE_GRID
    own = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    return PatchTargets(
        color=torch.from_numpy(np.where(shown, 1 + kinds[..., 0].astype(np.int64), other)),
        shape=torch.from_numpy(np.where(shown, 1 + what, other)),
        own_place=torch.from_numpy(np.tile(own.astype(np.float32), (len(labels), 1, 1))),
        object_place=torch.from_numpy(place.astype(np.float32)),
        object_known=torch.from_numpy(shown & ((place >= 0) & (place <= 1)).all(-1)),
        attention=torch.from_numpy(attention),
    )


def split_labels(store: PictureStore, chosen: np.ndarray) -> np.ndarray:
    """Return int8[B, 5, 144], the labels of every view of the chosen pictures."""
    grid = np.asarray(store.labels[chosen]).reshape(-1, 2, TILE_GRID, 2, TILE_GRID)
    tiles = grid.swapaxes(2, 3).reshape(len(chosen), TILES, -1)
    return np.concatenate([np.asarray(store.base_labels[chosen])[:, None], tiles], 1)


def draw_batch(
    store: PictureStore, chosen: np.ndarray, base_share: float, rng: np.random.Generator
) -> tuple[Tensor, PatchTargets]:
    """Return the pixels of one view of each chosen picture, and its targets."""
    slots = describe_slots(store, chosen)
    views = draw_views(slots, base_share, rng)
    images = torch.from_numpy(np.stack([store.images[index] for index in chosen]))
    bases = torch.from_numpy(np.stack([store.bases[index] for index in chosen]))
    pixels = cut_views(images, bases)[torch.arange(len(chosen)), torch.from_numpy(views)]
    labels = split_labels(store, chosen)[np.arange(len(chosen)), views]
    return normalise(pixels), make_targets(labels, slots, views)


@torch.no_grad()
def measure_tower(tower: nn.Module, heads: PatchHeads, store: PictureStore) -> dict[str, float]:
    """Measure what the tower says of patches that show something, by kind of view."""
    report: dict[str, float] = {}
    for name, base_share in (("tile", 0.0), ("base", 1.0)):
        rng = np.random.default_rng(9)
        pixels, targets = draw_batch(store, np.arange(min(200, len(store))), base_share, rng)
        seen = look(tower, pixels)
        color, shape, *_ = heads.read_patches(seen.features)
        known = targets.color > 0
        right = color.argmax(-1) == targets.color
        report[f"{name}_color"] = float(right[known].float().mean())
        hit = shape.argmax(-1) == targets.shape
        for what, mask in (
            ("shape", known & (targets.shape <= len(SHAPES))),
            ("sign", targets.shape > len(SHAPES)),
        ):
            report[f"{name}_{what}"] = float(hit[mask].float().mean())
        report[f"{name}_background"] = float(hit[targets.shape == 0].float().mean())
        mass = seen.received / seen.received.sum(1, keepdim=True)
        report[f"{name}_attention"] = float((mass * (targets.color != 0)).sum(1).mean())
    return {name: round(value, 4) for name, value in report.items()}


def train_tower(
    tower: nn.Module,
    store: PictureStore,
    validation: PictureStore,
    options: TileOptions,
    state: TrainingState,
    log: ProgressLog,
) -> None:
    """Train the tower in place; see `onevision.tower_of`."""
    heads = PatchHeads(SHOWN)
    modules = nn.ModuleDict({"tower": tower, "heads": heads})

    def losses_at(step: int) -> StepOutcome:
        rng = np.random.default_rng((options.seed, 30, step))
        chosen = np.sort(rng.choice(len(store), options.batch, replace=False))
        pixels, targets = draw_batch(store, chosen, options.base_share, rng)
        with torch.autocast("cpu", torch.bfloat16):
            seen = look(tower, pixels)
        losses = patch_losses(seen.features, heads, targets, options.background_weight)
        losses["attention"] = options.attention_weight * attention_loss(
            seen.received, targets.attention, options.attention_floor
        )
        return StepOutcome(losses, options.batch, "views")

    measure: Callable[[], dict[str, object]] = lambda: dict(  # noqa: E731
        measure_tower(tower, heads, validation)
    )
    run_steps(modules, options.learning, losses_at, state, log, measure, measure_every=100)
