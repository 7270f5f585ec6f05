"""Train the pocket LLaVA from nothing: render scenes, teach the tower, then the language model.

    python models/pocket-llava/train.py                  # both stages, seed 0, then the checkpoint
    python models/pocket-llava/train.py --seed 1 --out models/pocket-llava/run-1/checkpoint

A run that was interrupted continues where it stood. Image counts, not hours, decide when it ends.
"""

from __future__ import annotations

import argparse
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=("all", "tower", "language"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="where state and logs go (run-SEED beside this)")
    parser.add_argument("--scenes", type=Path, help="where rendered scenes are kept")
    parser.add_argument("--out", type=Path, help="where the checkpoint goes (the run by default)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = options.run or HERE / f"run-{options.seed}"
    run.mkdir(parents=True, exist_ok=True)
    scenes = open_scenes(options.scenes or HERE / "run-scenes", options.seed)
    model = build_model(options.seed)
    run_tower_stage(model, scenes, run, options.seed)
    if options.stage == "tower":
        return 0
    run_language_stage(model, scenes, run, options.seed)
    out = options.out or run / "checkpoint"
    write_checkpoint(model, out)
    print(f"{out}: checkpoint written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
