"""Stage 1: teach the tower what is where, first on windows of the patch grid, then on all of it.

Rendered scenes enter; a trained tower leaves. Looking at 12 x 12 patches out of 24 x 24 costs a
fifth of a whole picture and shows objects at the same scale, with the position embeddings of the
place it was cut from. The whole grid comes last, because the class token has to attend over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from architecture import HIDDEN_SIZE, TowerLook, look, tiles_from_images
from layout import COLORS, GRID_SIZE, KIND_COUNT, MAX_OBJECTS_DENSE, SHAPES
from scene_store import SceneStore
from torch import Tensor, nn
from torch.nn import functional
from tower_targets import PLACE_BINS, PatchTargets, TowerTargets, make_targets, soft_bins
from training_loop import build_optimizer, learning_rate_at, take_step
from training_state import ProgressLog, TrainingState


@dataclass(frozen=True)
class Phase:
    """A stretch of tower training on windows of one size."""

    window: int
    images: int
    batch: int

    @property
    def cost(self) -> float:
        """Work in units of one patch, attention included."""
        patches = self.window**2 + 1
        return self.images * patches * (1 + patches / 800)


@dataclass(frozen=True)
class TowerOptions:
    """How the tower is trained. Images count what was looked at, not distinct scenes."""

    phases: tuple[Phase, ...] = (Phase(12, 64_000, 64), Phase(24, 12_288, 24))
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    attention_weight: float = 0.3
    attention_floor: float = 0.1  # share of the target spread over all patches, to keep floors flat
    background_weight: float = 0.25
    seed: int = 0


class PatchHeads(nn.Module):
    """What the losses of patches read; thrown away after training.

    They compare directions: features and weights are normalised, and the scale is fixed. So no
    attribute can be kept at a small amplitude that only a large weight could read, which is what
    an LLM behind a projector would then miss.
    """

    def __init__(self, shapes: int = len(SHAPES)) -> None:
        super().__init__()
        self.sizes = [len(COLORS) + 1, shapes + 1, *[PLACE_BINS] * 4]
        self.patch = nn.Linear(HIDDEN_SIZE, sum(self.sizes), bias=False)
        self.scale = 20.0

    def read_patches(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return logits of colour, shape, own x, own y, object x, object base y per patch."""
        directions = functional.normalize(features, dim=-1)
        weights = functional.normalize(self.patch.weight, dim=-1)
        logits = (self.scale * directions @ weights.T).split(self.sizes, dim=-1)
        return tuple(logits)


class TowerHeads(PatchHeads):
    """What the losses of patches and of the class token read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN_SIZE)
        per_class = KIND_COUNT * 4 + MAX_OBJECTS_DENSE + 1
        self.inner_class = nn.Linear(HIDDEN_SIZE, per_class)
        self.last_class = nn.Linear(HIDDEN_SIZE, per_class)
        for head in (self.inner_class, self.last_class):
            nn.init.constant_(head.bias, 0.0)
            nn.init.constant_(head.bias[:KIND_COUNT], -2.5)

    def read_class_token(self, token: Tensor, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return presence [B, K], side [B, K, 3] and count logits of a class token."""
        output = self.last_class(token) if last else self.inner_class(self.norm(token))
        sizes = [KIND_COUNT, KIND_COUNT * 3, MAX_OBJECTS_DENSE + 1]
        presence, side, count = output.split(sizes, -1)
        return presence, side.unflatten(-1, (KIND_COUNT, 3)), count


def _bin_loss(logits: Tensor, value: Tensor) -> Tensor:
    """Cross-entropy against the two nearest bins, per element."""
    return -(soft_bins(value) * logits.log_softmax(-1)).sum(-1)


def patch_losses(
    features: Tensor, heads: PatchHeads, targets: PatchTargets, background_weight: float
) -> dict[str, Tensor]:
    """Return the losses of what patches show and where, float32[B, P, D] features given."""
    color, shape, own_x, own_y, object_x, object_y = heads.read_patches(features)
    losses: dict[str, Tensor] = {}
    for name, logits, target in (("color", color, targets.color), ("shape", shape, targets.shape)):
        weights = torch.ones(logits.shape[-1])
        weights[0] = background_weight
        losses[name] = functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), weight=weights, ignore_index=-100
        )
    own = _bin_loss(own_x, targets.own_place[..., 0]) + _bin_loss(own_y, targets.own_place[..., 1])
    losses["own_place"] = 0.1 * own.mean()
    if targets.object_known.any():
        known = targets.object_known
        place = targets.object_place[known]
        at_x = _bin_loss(object_x[known], place[:, 0])
        at_y = _bin_loss(object_y[known], place[:, 1])
        losses["object_place"] = 0.5 * (at_x + at_y).mean()
    return losses


def attention_loss(focus: Tensor, wanted: Tensor, floor: float) -> Tensor:
    """Return how far attention is from what is wanted, both float32[B, P].

    Args:
        focus: attention to each patch; it need not sum to one.
        wanted: see `PatchTargets.attention`.
        floor: share of it that is spread over all patches.
    """
    focus = focus / focus.sum(1, keepdim=True)
    in_view = wanted.sum(1, keepdim=True)
    wanted = (1 - floor) * wanted + floor / focus.shape[1] * in_view
    return -(wanted * (focus + 1e-6).log()).sum(1).mean()


def tower_losses(
    seen: TowerLook, heads: TowerHeads, targets: TowerTargets, options: TowerOptions
) -> dict[str, Tensor]:
    """Return every loss by name, already weighted."""
    losses = patch_losses(seen.features[:, 1:], heads, targets, options.background_weight)
    for name, token, last in (
        ("class", seen.features[:, 0], False),
        ("class_last", seen.class_token, True),
    ):
        losses[name] = _class_token_loss(heads.read_class_token(token, last), targets)
    losses["attention"] = options.attention_weight * attention_loss(
        seen.attention.mean(1), targets.attention, options.attention_floor
    )
    return losses


def _class_token_loss(logits: tuple[Tensor, Tensor, Tensor], targets: TowerTargets) -> Tensor:
    presence, side, count = logits
    per_kind = functional.binary_cross_entropy_with_logits(
        presence, targets.presence, weight=targets.presence_known, reduction="none"
    )
    counted = functional.cross_entropy(count, targets.count)
    loss = per_kind.sum(1).mean() * 0.5 + 0.2 * counted
    if (targets.side >= 0).any():
        loss = loss + 0.2 * functional.cross_entropy(
            side.flatten(0, 1), targets.side.flatten(), ignore_index=-100
        )
    return loss


def cut_windows(
    store: SceneStore, chosen: np.ndarray, window: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, TowerTargets]:
    """Cut one window out of each chosen scene, mostly around an object.

    Returns:
        tiles: float32[B, window ** 2, 192], places: int64[B, window ** 2], and the targets.
    """
    objects = np.asarray(store.objects[chosen])
    limit = GRID_SIZE - window
    counts = (objects[..., 0] >= 0).sum(1)
    aimed = objects[np.arange(len(chosen)), rng.integers(0, counts), 1:3] / 8
    corner = aimed[:, ::-1] - rng.uniform(1, max(window - 1, 2), (len(chosen), 2))
    corner = np.clip(np.round(corner), 0, limit).astype(np.int64)  # row, column
    steps = np.arange(window)
    rows = corner[:, 0, None] + steps
    columns = corner[:, 1, None] + steps
    places = (rows[:, :, None] * GRID_SIZE + columns[:, None, :]).reshape(len(chosen), -1)
    images = np.stack([store.images[index] for index in chosen])
    tiles = tiles_from_images(torch.from_numpy(images)).flatten(1, 2)
    places_tensor = torch.from_numpy(places)
    tiles = tiles.gather(1, places_tensor[..., None].expand(-1, -1, tiles.shape[-1]))
    labels = np.take_along_axis(np.asarray(store.labels[chosen]), places, 1)
    return tiles, places_tensor, make_targets(labels, objects, places)


def train_tower(
    tower: nn.Module,
    stores: dict[int, SceneStore],
    options: TowerOptions,
    state: TrainingState,
    log: ProgressLog,
    check: Callable[[], None],
) -> None:
    """Train the tower in place.

    Args:
        tower: see `architecture.tower_of`.
        stores: scenes to look at, by the size of the window.
        options: the recipe.
        state: where to resume from, and to save to.
        log: where losses go.
        check: called now and then to measure the tower on validation scenes.
    """
    heads = TowerHeads()
    modules = nn.ModuleDict({"tower": tower, "heads": heads})
    optimizer = build_optimizer(modules, options.learning_rate, options.weight_decay)
    step = state.resume(modules, optimizer)
    total = sum(phase.cost for phase in options.phases)
    first_step, done = 0, 0.0
    for phase in options.phases:
        steps = phase.images // phase.batch
        for index in range(max(0, step - first_step), steps):
            progress = (done + phase.cost * index / steps) / total
            rng = np.random.default_rng((options.seed, 10, step))
            store = stores[phase.window]
            chosen = rng.choice(len(store), phase.batch, replace=False)
            tiles, places, targets = cut_windows(store, chosen, phase.window, rng)
            with torch.autocast("cpu", torch.bfloat16):
                seen = look(tower, tiles, places)
            losses = tower_losses(seen, heads, targets, options)
            loss = torch.stack(list(losses.values())).sum()
            rate = learning_rate_at(progress, step, options.learning_rate, options.warmup_steps)
            take_step(modules, optimizer, loss, rate)
            step += 1
            log.record(step, phase.batch, losses, f"window {phase.window} {progress:.1%}")
            if step % 500 == 0:
                state.save(modules, optimizer, step)
                check()
        first_step += steps
        done += phase.cost
    state.save(modules, optimizer, step)
