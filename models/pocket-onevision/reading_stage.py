"""Stage 2: teach projector, newline and language model to answer, on the frozen tower's features.

A trained tower, pictures and clips enter; what the language stage trains leaves. Tokens stay in
their order, from which a tile and a time can be read. Most batches drop tokens at random, though
never all those of an object, so that no answer leans on how many there are. No reducer is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answering import read_visual, whole_answers
from architecture import HIDDEN_SIZE, tower_of
from clips import FRAMES
from events import CLIP_TYPES, POOLED_GRID
from feature_cache import cache_features
from language_stage import choose_patches
from onevision import (
    TILE_PATCHES,
    TILES,
    VIEWS_TOKENS,
    clip_tokens,
    cut_views,
    look,
    normalise,
    order_views,
    picture_tokens,
    place_newlines,
    trained_by_language,
)
from packing import PackedText, pack
from pictures import PICTURE_TYPES, TILE_TYPES
from questions import Question, ask_of_each, choose_questions
from tile_stage import SLOTS
from torch import Tensor, nn
from torch.nn import functional
from training_loop import Learning, StepOutcome, run_steps
from training_state import ProgressLog, TrainingState
from transformers import LlavaOnevisionForConditionalGeneration
from view_store import ClipStore, PictureStore

CLIP_TOKENS = FRAMES * POOLED_GRID**2 + 1
_TEXT_LENGTH = 150  # of the questions packed behind a picture, about
# What is learned last is asked about more often.
_READING = {"color": 1.5, "shape": 0.6, "count": 0.6, "exists": 2.5, "where": 1.2, "left_of": 1.5}
_READING |= {"nearest": 1.0, "count_shape": 0.8, "path": 0.5, "list": 1.5, "sign_count": 0.6}
_READING |= {"sign_pattern": 2.0, "sign_color": 2.0, "sign_exists": 2.0, "clip_order": 2.0}
# After the first round colours, shapes and patterns are read but not always of the same thing.
_BINDING = {"color": 3.0, "shape": 0.6, "count": 0.4, "exists": 4.0, "where": 1.2, "left_of": 1.5}
_BINDING |= {"nearest": 0.6, "count_shape": 0.6, "path": 0.3, "list": 2.0, "sign_count": 0.3}
_BINDING |= {"sign_pattern": 2.0, "sign_color": 2.5, "sign_exists": 3.0, "clip_order": 1.5}
_BINDING |= {"clip_entered": 1.5, "clip_left": 1.5, "clip_moved": 1.5, "clip_first": 0.6}


@dataclass(frozen=True)
class Round:
    """A stretch of training with a learning rate that rises once and falls.

    Attributes:
        learning: its schedule.
        type_weights: how often each type is asked about.
    """

    learning: Learning
    type_weights: Mapping[str, float]


@dataclass(frozen=True)
class ReadingOptions:
    """How projector, newline and language model are trained.

    Attributes:
        rounds: one after the other.
        bound: the last round comes again until this share of the "exists" questions is right: a
            model learns all at once which colour goes with which shape, and seeds differ in when.
        most_repeats: how often the last round comes at most.
        short_share: share of a round's steps, the first, with at most `short_tokens`: short is
            cheap.
        whole_share: share of the later steps with all tokens of a picture.
        whole_clip_share: share of the clip steps with all tokens of a clip.
        clip_share: share of the steps that are about clips.
    """

    rounds: tuple[Round, ...] = (
        Round(Learning(6_000, 2e-3, 0.02, 200), _READING),
        Round(Learning(1_500, 2e-3, 0.02, 200), _BINDING),
    )
    bound: float = 0.9
    most_repeats: int = 4
    tokens_per_batch: int = 8_192  # fewer pictures a batch when each of them has more tokens
    largest_batch: int = 40
    questions_per_picture: int = 12
    short_share: float = 0.5
    short_tokens: int = 160
    fewest_tokens: int = 40
    fewest_clip_tokens: int = 64
    whole_share: float = 0.35
    whole_clip_share: float = 0.5
    clip_share: float = 0.5
    chained_share: float = 0.2
    system_prompt_share: float = 0.15
    seed: int = 0


@torch.no_grad()
def see_pictures(tower: nn.Module, images: np.ndarray, bases: np.ndarray) -> Tensor:
    """Return the tower's features of pictures, bfloat16[B, 5 * P, D]; see `order_views`."""
    views = cut_views(torch.from_numpy(np.array(images)), torch.from_numpy(np.array(bases)))
    with torch.autocast("cpu", torch.bfloat16):
        features = look(tower, normalise(views.flatten(0, 1))).features
    return order_views(features.to(torch.bfloat16).unflatten(0, (-1, 1 + TILES)))


@torch.no_grad()
def see_clips(tower: nn.Module, frames: np.ndarray) -> Tensor:
    """Return the tower's features of clips, bfloat16[B, F, P, D]."""
    flat = torch.from_numpy(np.array(frames)).flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        features = look(tower, normalise(flat)).features.to(torch.bfloat16)
    return features.view(-1, FRAMES, *features.shape[1:])


@dataclass(frozen=True)
class SeenPictures:
    """Pictures as the tower sees them: bfloat16[N, 5 * P, D] and what they show."""

    features: Tensor
    store: PictureStore

    @classmethod
    def open(cls, tower: nn.Module, store: PictureStore, path: Path) -> SeenPictures:
        """Run the tower over a store, or find its features again."""
        shape = ((1 + TILES) * TILE_PATCHES, HIDDEN_SIZE)
        see = lambda part: see_pictures(tower, store.images[part], store.bases[part])  # noqa: E731
        return cls(cache_features(path, len(store), shape, see), store)

    def labels(self, chosen: np.ndarray) -> Tensor:
        """Return int64[B, VIEWS_TOKENS]: the number of what each token shows; 0 for newlines.

        What is seen in the base and in a tile has two numbers, so that one token of both is kept.
        """
        base = np.asarray(self.store.base_labels[chosen]).astype(np.int64)
        tiles = np.asarray(self.store.labels[chosen]).astype(np.int64)
        tiles = np.where(tiles > 0, tiles + SLOTS, tiles)
        both = torch.from_numpy(np.concatenate([base, tiles], 1))
        source = place_newlines()
        return torch.where(source < 0, 0, both[:, source.clamp(min=0)])


@dataclass(frozen=True)
class SeenClips:
    """Clips as the tower sees them: bfloat16[N, F, P, D] and what happens in them."""

    features: Tensor
    store: ClipStore

    @classmethod
    def open(cls, tower: nn.Module, store: ClipStore, path: Path) -> SeenClips:
        """Run the tower over a store, or find its features again."""
        shape = (FRAMES, TILE_PATCHES, HIDDEN_SIZE)
        see = lambda part: see_clips(tower, store.frames[part])  # noqa: E731
        return cls(cache_features(path, len(store), shape, see), store)

    def labels(self, chosen: np.ndarray) -> Tensor:
        """Return int64[B, CLIP_TOKENS]: a number for each object of each frame, or 0."""
        labels = np.asarray(self.store.labels[chosen]).astype(np.int64)
        frame = np.arange(FRAMES)[None, :, None] * (labels.max() + 1)
        flat = np.where(labels > 0, labels + frame, 0).reshape(len(chosen), -1)
        return functional.pad(torch.from_numpy(flat), (0, 1))


def _pack(
    asked: Sequence[Sequence[Question]], options: ReadingOptions, rng: np.random.Generator
) -> tuple[PackedText, bool]:
    text = pack(asked, rng, options.chained_share)
    return text, bool(rng.random() < options.system_prompt_share)


def _keep(labels: Tensor, count: int) -> Tensor:
    """Choose tokens at random, in order, int64[B, count]."""
    return choose_patches(labels, count).sort(1).values


def _choose(
    count: int, options: ReadingOptions, total: int, rng: np.random.Generator
) -> np.ndarray:
    batch = min(options.largest_batch, options.tokens_per_batch // (count + _TEXT_LENGTH), total)
    return np.sort(rng.choice(total, batch, replace=False))


Answered = tuple[Tensor, Tensor, int]


def _read_pictures(
    model: LlavaOnevisionForConditionalGeneration,
    pictures: SeenPictures,
    options: ReadingOptions,
    weights: Mapping[str, float],
    progress: float,
    rng: np.random.Generator,
) -> Answered:
    """Draw a batch about pictures; return logits, targets and its size."""
    whole = progress >= options.short_share and rng.random() < options.whole_share
    most = options.short_tokens if progress < options.short_share else VIEWS_TOKENS
    count = int(np.exp(rng.uniform(np.log(options.fewest_tokens), np.log(most))))
    count = VIEWS_TOKENS if whole else count
    chosen = _choose(count, options, len(pictures.store), rng)
    kept = None if whole else _keep(pictures.labels(chosen), count)
    asked = [
        choose_questions(
            pictures.store.scene(index), options.questions_per_picture, weights, rng, PICTURE_TYPES
        )
        for index in chosen
    ]
    text, with_system = _pack(asked, options, rng)
    tokens = picture_tokens(model, pictures.features[chosen].float(), kept)
    return *read_visual(model, tokens, text, with_system_prompt=with_system), len(chosen)


def _read_clips(
    model: LlavaOnevisionForConditionalGeneration,
    clips: SeenClips,
    options: ReadingOptions,
    weights: Mapping[str, float],
    rng: np.random.Generator,
) -> Answered:
    """Draw a batch about clips; return logits, targets and its size."""
    whole = rng.random() < options.whole_clip_share
    few, most = np.log(options.fewest_clip_tokens), np.log(CLIP_TOKENS)
    count = CLIP_TOKENS if whole else int(np.exp(rng.uniform(few, most)))
    chosen = _choose(count, options, len(clips.store), rng)
    kept = None if whole else _keep(clips.labels(chosen), count)
    asked = [
        choose_questions(clips.store.events(index), len(CLIP_TYPES), weights, rng, CLIP_TYPES)
        for index in chosen
    ]
    text, with_system = _pack(asked, options, rng)
    tokens = clip_tokens(model, clips.features[chosen].float(), kept)
    return *read_visual(model, tokens, text, with_system_prompt=with_system), len(chosen)


@torch.no_grad()
def judge(
    model: LlavaOnevisionForConditionalGeneration,
    tokens_of: Callable[[slice], Tensor],
    asked: Sequence[Sequence[Question]],
    batch: int = 20,
) -> np.ndarray:
    """Return bool[questions], in order: which are answered exactly.

    Args:
        model: the whole model.
        tokens_of: returns the visual tokens of some of the pictures or clips.
        asked: the questions about each of them.
        batch: how many of them at a time.
    """
    right = []
    for start in range(0, len(asked), batch):
        part = slice(start, min(start + batch, len(asked)))
        text = pack(asked[part])
        if text.asked:
            right.append(whole_answers(*read_visual(model, tokens_of(part), text), text).numpy())
    return np.concatenate(right)


def _by_type(right: np.ndarray, asked: Sequence[Sequence[Question]]) -> dict[str, float]:
    types = np.array([question.type for questions in asked for question in questions])
    return {str(name): round(float(right[types == name].mean()), 3) for name in np.unique(types)}


def measure(
    model: LlavaOnevisionForConditionalGeneration, pictures: SeenPictures, clips: SeenClips
) -> dict[str, object]:
    """Return exact match on validation pictures and clips, all tokens, and what the base gives."""
    report: dict[str, object] = {}
    rng = np.random.default_rng(6)
    seen = range(len(pictures.store))
    asked = [ask_of_each(pictures.store.scene(index), rng, PICTURE_TYPES) for index in seen]
    features = pictures.features
    with torch.autocast("cpu", torch.bfloat16):
        right = judge(model, lambda part: picture_tokens(model, features[part].float()), asked)
        base = judge(
            model,
            lambda part: picture_tokens(model, features[part].float())[:, :TILE_PATCHES],
            asked,
        )
        happened = [
            ask_of_each(clips.store.events(i), rng, CLIP_TYPES) for i in range(len(clips.store))
        ]
        moved = judge(
            model, lambda part: clip_tokens(model, clips.features[part].float()), happened
        )
    report["pictures"] = round(float(right.mean()), 4)
    report["clips"] = round(float(moved.mean()), 4)
    report["types"] = _by_type(right, asked) | _by_type(moved, happened)
    by_base: Mapping[str, float] = _by_type(base, asked)
    report["base_alone"] = {name: by_base[name] for name in TILE_TYPES}
    return report


def train_reading(
    model: LlavaOnevisionForConditionalGeneration,
    pictures: SeenPictures,
    clips: SeenClips,
    validation: tuple[SeenPictures, SeenClips],
    options: ReadingOptions,
    run: Path,
) -> None:
    """Train projector, newline and language model in place; the tower stays as it is."""
    log = ProgressLog(run / "log.jsonl", "language")
    last = len(options.rounds) - 1
    for number in range(last + options.most_repeats):
        current = options.rounds[min(number, last)]
        state = TrainingState(run / f"language-state-{number}.safetensors")
        _train_round(model, pictures, clips, validation, options, current, number, state, log)
        if number >= last and _share_bound(model, *validation) >= options.bound:
            return


def _share_bound(
    model: LlavaOnevisionForConditionalGeneration, pictures: SeenPictures, clips: SeenClips
) -> float:
    """Return the share of the "exists" questions that are answered right."""
    types: Any = measure(model, pictures, clips)["types"]
    return float(types["exists"])


def _train_round(
    model: LlavaOnevisionForConditionalGeneration,
    pictures: SeenPictures,
    clips: SeenClips,
    validation: tuple[SeenPictures, SeenClips],
    options: ReadingOptions,
    current: Round,
    number: int,
    state: TrainingState,
    log: ProgressLog,
) -> None:
    def losses_at(step: int) -> StepOutcome:
        rng = np.random.default_rng((options.seed, 40 + number, step))
        torch.manual_seed(int(rng.integers(2**31)))
        about_clips = rng.random() < options.clip_share
        progress, weights = step / current.learning.steps, current.type_weights
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets, batch = (
                _read_clips(model, clips, options, weights, rng)
                if about_clips
                else _read_pictures(model, pictures, options, weights, progress, rng)
            )
        loss = functional.cross_entropy(logits, targets)
        name = "clip_answers" if about_clips else "answers"
        return StepOutcome({name: loss}, batch, f"round {number}")

    run_steps(
        trained_by_language(model), current.learning, losses_at, state, log,
        lambda: measure(model, *validation),
    )  # fmt: skip


def open_seen(
    model: LlavaOnevisionForConditionalGeneration,
    stores: tuple[PictureStore, ClipStore],
    run: Path,
    name: str,
) -> tuple[SeenPictures, SeenClips]:
    """Run the model's tower over pictures and clips, or find their features under `run` again."""
    tower = tower_of(model)
    pictures, clips = stores
    return (
        SeenPictures.open(tower, pictures, run / f"{name}-pictures.bin"),
        SeenClips.open(tower, clips, run / f"{name}-clips.bin"),
    )
