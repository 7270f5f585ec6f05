"""Stage 2: teach projector and language model to answer, on the frozen tower's features.

A trained tower and rendered scenes enter; trained projector and language model leave. Image
tokens are shuffled and the text starts after a random gap, so that a place can only be read from
a token's features. Most batches drop patches at random, though never the last one of an object,
so that objects are not counted by how many tokens they have. No reducer is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from answering import answer_logits, right_answers
from architecture import HIDDEN_SIZE, TOWER_HEADS, look, tiles_from_images, tower_of
from feature_cache import cache_features
from layout import GRID_SIZE, objects_from_array
from packing import pack
from questions import TYPES, ask_each_type, choose_questions
from reducers import REDUCERS, SeenBatch, all_patches
from scene_store import SceneStore
from torch import Tensor, nn
from torch.nn import functional
from training_loop import build_optimizer, learning_rate_at, take_step
from training_state import ProgressLog, TrainingState
from transformers import LlavaForConditionalGeneration

PATCHES = GRID_SIZE**2
_TEXT_LENGTH = 150  # of twelve packed questions, about
_LARGEST_BATCH = 48


@dataclass(frozen=True)
class Round:
    """A stretch of language training with a learning rate that rises once and falls.

    Attributes:
        steps: how many batches.
        short_share: share of the steps, the first, with at most `short_tokens`: short is cheap.
        type_weights: how often each type is asked about.
        fewest_tokens: of a batch.
    """

    steps: int
    short_share: float
    type_weights: Mapping[str, float]
    fewest_tokens: int = PATCHES // 9


# What is learned last is asked about more often.
_READING = {"color": 1.5, "shape": 0.6, "count": 0.8, "exists": 2.0, "where": 1.2, "left_of": 2.0}
_READING |= {"nearest": 1.2, "path": 0.6, "list": 1.5}
# After the first round, colours and shapes are read but not always of the same object.
_BINDING = {"color": 3.0, "shape": 0.6, "count": 0.4, "exists": 4.0, "where": 1.5, "left_of": 1.5}
_BINDING |= {"nearest": 0.6, "count_shape": 0.6, "path": 0.4, "list": 2.0}


@dataclass(frozen=True)
class LanguageOptions:
    """How projector and language model are trained."""

    rounds: tuple[Round, ...] = (
        Round(2_500, 0.55, _READING),
        Round(1_200, 0.6, _BINDING, fewest_tokens=12),
    )
    # A model learns all at once which colour goes with which shape, and seeds differ in when: the
    # last round comes again until this share of the "exists" questions is right, or so often.
    bound: float = 0.9
    most_repeats: int = 3
    scenes: int = 12_000
    tokens_per_batch: int = 8_192  # fewer pictures a batch when each of them has more tokens
    questions_per_image: int = 12
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup_steps: int = 200
    all_tokens_share: float = 0.2
    short_tokens: int = 128
    chained_share: float = 0.2
    system_prompt_share: float = 0.15
    class_token_share: float = 0.0
    max_gap: int = 576
    seed: int = 0


@torch.no_grad()
def see(tower: nn.Module, images: np.ndarray) -> SeenBatch:
    """Run the tower on whole pictures, uint8[B, S, S, 3]."""
    tiles = tiles_from_images(torch.from_numpy(np.ascontiguousarray(images))).flatten(1, 2)
    places = torch.arange(tiles.shape[1]).expand(len(tiles), -1)
    with torch.autocast("cpu", torch.bfloat16):
        seen = look(tower, tiles, places)
    keys = seen.keys.unflatten(-1, (TOWER_HEADS, -1)).mean(2)
    return SeenBatch(seen.features, seen.attention.sum(1).float(), keys.float())


def choose_patches(labels: Tensor, count: int) -> Tensor:
    """Choose `count` patches of each picture, in random order, at least one of every object.

    Args:
        labels: int64[B, P], see `scenes.label_patches`.
        count: how many to keep.

    Returns:
        int64[B, count]. The share of object patches among the rest is random per picture.
    """
    score = torch.rand(labels.shape)
    objects = labels.clamp(min=0)
    best = torch.zeros(len(labels), int(objects.max()) + 1)
    best.scatter_reduce_(1, objects, score, "amax")
    last_of_object = (score == best.gather(1, objects)) & (labels > 0)
    favour = (torch.rand(len(labels), 1) * 1.2 - 0.6) * (labels > 0)
    order = (score + favour + 10 * last_of_object).topk(count, 1).indices
    return order.gather(1, torch.rand(order.shape).argsort(1))


def _token_count(
    options: LanguageOptions, current: Round, progress: float, rng: np.random.Generator
) -> int:
    """Draw how many image tokens a batch has."""
    if progress < current.short_share:
        most = options.short_tokens
    elif rng.random() < options.all_tokens_share / (1 - current.short_share):
        return PATCHES
    else:
        most = PATCHES
    return int(np.exp(rng.uniform(np.log(current.fewest_tokens), np.log(most))))


def _draw_batch(
    features: Tensor,
    store: SceneStore,
    options: LanguageOptions,
    current: Round,
    progress: float,
    step: int,
) -> tuple[Tensor, dict[str, object]]:
    """Draw a batch: image tokens, and the other arguments of `answer_logits`."""
    rng = np.random.default_rng((options.seed, 20, step))
    torch.manual_seed(int(rng.integers(2**31)))
    count = _token_count(options, current, progress, rng)
    batch = min(_LARGEST_BATCH, options.tokens_per_batch // (count + _TEXT_LENGTH))
    chosen = np.sort(rng.choice(len(store), batch, replace=False))
    rows = features[chosen].float()
    labels = torch.from_numpy(np.asarray(store.labels[chosen]).astype(np.int64))
    order = choose_patches(labels, count)
    tokens = rows[:, 1:].gather(1, order[..., None].expand(-1, -1, HIDDEN_SIZE))
    if rng.random() < options.class_token_share:
        tokens = torch.cat([rows[:, :1], tokens], 1)
    questions = [
        choose_questions(
            objects_from_array(row), options.questions_per_image, current.type_weights, rng, TYPES
        )
        for row in store.objects[chosen]
    ]
    text = pack(questions, rng, options.chained_share)
    gap = int(rng.integers(options.max_gap)) if rng.random() < 0.7 else 0
    system = bool(rng.random() < options.system_prompt_share)
    return tokens, {"text": text, "gap": gap, "with_system_prompt": system}


@dataclass(frozen=True)
class Validation:
    """Validation scenes as the tower sees them, and one question of each type about each."""

    seen: SeenBatch
    store: SceneStore

    def measure(self, model: LlavaForConditionalGeneration, count: int) -> dict[str, Any]:
        """Return exact match per type with all tokens, and overall with a few reducers."""
        report: dict[str, Any] = {}
        settings = [("all", PATCHES), ("visionzip", 64), ("uniform", 64), ("random", 64)]
        for name, budget in settings:
            right, types = self._answer(model, name, budget, count)
            report[f"{name}@{budget}"] = round(float(right.mean()), 4)
            if name == "all":
                per_type = {t: round(float(right[types == t].mean()), 3) for t in np.unique(types)}
                report["types"] = {str(name): share for name, share in per_type.items()}
        return report

    def _answer(
        self, model: LlavaForConditionalGeneration, name: str, budget: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        reduce = REDUCERS.get(name, all_patches)
        right: list[np.ndarray] = []
        types: list[str] = []
        for start in range(0, count, 50):
            part = slice(start, start + 50)
            seen = SeenBatch(self.seen.features[part], self.seen.scores[part], self.seen.keys[part])
            rng = np.random.default_rng((5, start))
            text = pack(
                [ask_each_type(objects_from_array(o), rng) for o in self.store.objects[part]]
            )
            with torch.autocast("cpu", torch.bfloat16):
                right.append(right_answers(model, reduce(seen, budget), text).numpy())
            types += [question.type for question in text.asked]
        return np.concatenate(right), np.array(types)


def open_validation(tower: nn.Module, store: SceneStore, count: int) -> Validation:
    """Run the tower on the first `count` validation scenes."""
    parts = [see(tower, store.images[start : start + 50]) for start in range(0, count, 50)]
    joined = SeenBatch(
        torch.cat([part.features for part in parts]),
        torch.cat([part.scores for part in parts]),
        torch.cat([part.keys for part in parts]),
    )
    return Validation(joined, store)


def train_language(
    model: LlavaForConditionalGeneration,
    store: SceneStore,
    validation_store: SceneStore,
    options: LanguageOptions,
    state: TrainingState,
    log: ProgressLog,
) -> None:
    """Train projector and language model in place; the tower stays as it is."""
    tower = tower_of(model)
    store = store.first(options.scenes)
    features = cache_features(
        state.path.with_name("features.bin"),
        len(store),
        (1 + PATCHES, HIDDEN_SIZE),
        lambda part: see(tower, store.images[part]).features.to(torch.bfloat16),
        batch=40,
    )
    validation = open_validation(tower, validation_store, 200)
    modules = nn.ModuleDict(
        {"projector": model.model.multi_modal_projector, "llm": model.model.language_model}
    )
    optimizer = build_optimizer(modules, options.learning_rate, options.weight_decay)
    step = state.resume(modules, optimizer)
    while not _is_over(options, step, lambda: validation.measure(model, 200)):
        current, index = place_of_step(options, step)
        progress = index / current.steps
        tokens, rest = _draw_batch(features, store, options, current, progress, step)
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets = answer_logits(model, tokens, **rest)  # type: ignore[arg-type]
        loss = functional.cross_entropy(logits, targets)
        rate = learning_rate_at(progress, index, options.learning_rate, options.warmup_steps)
        take_step(modules, optimizer, loss, rate)
        step += 1
        log.record(step, len(tokens), {"answers": loss}, f"{progress:.1%}")
        if step % 500 == 0:
            state.save(modules, optimizer, step)
            log.write({"step": step, "validation": validation.measure(model, 100)})
    state.save(modules, optimizer, step)
    log.write({"step": step, "validation": validation.measure(model, 200)})


def place_of_step(options: LanguageOptions, step: int) -> tuple[Round, int]:
    """Return the round a step is in, and how many of its steps are behind.

    After the last round, the last round comes again.
    """
    for current in options.rounds:
        if step < current.steps:
            return current, step
        step -= current.steps
    last = options.rounds[-1]
    return last, step % last.steps


def _is_over(options: LanguageOptions, step: int, measure: Callable[[], Mapping[str, Any]]) -> bool:
    """Say, where a last round ends, whether it has to come again."""
    last = options.rounds[-1]
    beyond = step - sum(current.steps for current in options.rounds)
    if beyond < 0 or beyond % last.steps:
        return False
    return (
        beyond == options.most_repeats * last.steps or measure()["types"]["exists"] >= options.bound
    )
