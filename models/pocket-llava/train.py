"""Train the pocket LLaVA from nothing: render scenes, teach the tower, then the language model.

    python models/pocket-llava/train.py                  # both stages, seed 0, then the checkpoint
    python models/pocket-llava/train.py --seed 1 --out models/pocket-llava/run-1/checkpoint

A run that was interrupted continues where it stood. Image counts, not hours, decide when it ends.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # do not burn a shared core while waiting
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from architecture import build_model, tower_of
from checkpoint import write_checkpoint
from language_stage import LanguageOptions, train_language
from scene_store import SceneStore, open_store
from scenes import SEED_STRIDE, TRAIN_SEED, VALIDATION_SEED
from tower_check import class_attention, measure_attention
from tower_stage import TowerOptions, train_tower
from training_command import read_training_command
from training_state import ProgressLog, TrainingState, load_weights, save_weights
from transformers import LlavaForConditionalGeneration

HERE = Path(__file__).resolve().parent
DENSE_SCENES = 16_000
PLAIN_SCENES = 24_000
VALIDATION_SCENES = 600


def open_scenes(folder: Path, seed: int) -> dict[str, SceneStore]:
    """Render, or find again, the scenes a seed trains on and the ones all seeds validate on."""
    first = TRAIN_SEED + SEED_STRIDE * seed
    return {
        "dense": open_store(folder, "dense", first, DENSE_SCENES, dense=True),
        "plain": open_store(folder, "plain", first + 1, PLAIN_SCENES),
        "validation": open_store(folder, "validation", VALIDATION_SEED, VALIDATION_SCENES),
    }


def run_tower_stage(
    model: LlavaForConditionalGeneration, scenes: dict[str, SceneStore], run: Path, seed: int
) -> None:
    """Train the tower of `model`, or load it where this run has finished it before."""
    finished = run / "tower.safetensors"
    tower = tower_of(model)
    if finished.exists():
        load_weights(tower, finished)
        return
    log = ProgressLog(run / "log.jsonl", "tower")
    validation = scenes["validation"]

    def check() -> None:
        attention = class_attention(tower, validation, 200)
        log.write({"validation": measure_attention(attention, validation.labels[:200])})

    options = replace(TowerOptions(), seed=seed)
    stores = {12: scenes["dense"], 24: scenes["plain"]}
    train_tower(tower, stores, options, TrainingState(run / "tower-state.safetensors"), log, check)
    save_weights(tower, finished)


def run_language_stage(
    model: LlavaForConditionalGeneration, scenes: dict[str, SceneStore], run: Path, seed: int
) -> None:
    """Train projector and language model of `model` on the frozen tower's features."""
    finished = run / "model.safetensors"
    if not finished.exists():
        options = replace(LanguageOptions(), seed=seed)
        log = ProgressLog(run / "log.jsonl", "language")
        state = TrainingState(run / "language-state.safetensors")
        train_language(model, scenes["plain"], scenes["validation"], options, state, log)
        save_weights(model, finished)
    load_weights(model, finished)


def main() -> int:
    """Read the command line and train what is not trained yet."""
    asked = read_training_command(__doc__, HERE)
    torch.set_num_threads(asked.threads)
    scenes = open_scenes(asked.scenes, asked.seed)
    model = build_model(asked.seed)
    run_tower_stage(model, scenes, asked.run, asked.seed)
    if asked.tower_only:
        return 0
    run_language_stage(model, scenes, asked.run, asked.seed)
    write_checkpoint(model, asked.out)
    print(f"{asked.out}: checkpoint written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
