"""Train pocket-onevision from nothing: render, teach the tower, then the language model.

    python models/pocket-onevision/train.py             # both stages, seed 0, then the checkpoint

A run that was interrupted continues where it stood. Image counts, not hours, decide when it ends.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # do not burn a shared core while waiting
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import paths  # noqa: F401 - makes pocket-llava's modules importable

import torch  # isort: skip
from architecture import tower_of
from onevision import build_model
from onevision_checkpoint import write_checkpoint
from pictures import TRAIN_SEED, VALIDATION_SEED
from reading_stage import ReadingOptions, open_seen, train_reading
from scenes import SEED_STRIDE
from tile_stage import TileOptions, train_tower
from training_command import read_training_command
from training_state import ProgressLog, TrainingState, load_weights, save_weights
from transformers import LlavaOnevisionForConditionalGeneration
from view_store import open_clips, open_pictures

HERE = Path(__file__).resolve().parent
DENSE_PICTURES = 8_000
PLAIN_PICTURES = 8_000
CLIPS = 4_000
VALIDATION_PICTURES = 300
VALIDATION_CLIPS = 200


def run_tower_stage(
    model: LlavaOnevisionForConditionalGeneration, scenes: Path, run: Path, seed: int
) -> None:
    """Train the tower of `model`, or load it where this run has finished it before."""
    finished = run / "tower.safetensors"
    tower = tower_of(model)
    if not finished.exists():
        first = TRAIN_SEED + SEED_STRIDE * seed
        store = open_pictures(scenes, "dense", first, DENSE_PICTURES, dense=True)
        validation = open_pictures(scenes, "validation", VALIDATION_SEED, VALIDATION_PICTURES)
        state = TrainingState(run / "tower-state.safetensors")
        log = ProgressLog(run / "log.jsonl", "tower")
        train_tower(tower, store, validation, replace(TileOptions(), seed=seed), state, log)
        save_weights(tower, finished)
    load_weights(tower, finished)


def run_language_stage(
    model: LlavaOnevisionForConditionalGeneration, scenes: Path, run: Path, seed: int
) -> None:
    """Train what reads the frozen tower of `model`, or load it where this run has finished it."""
    finished = run / "model.safetensors"
    if not finished.exists():
        first = TRAIN_SEED + SEED_STRIDE * seed + 1
        stores = (
            open_pictures(scenes, "plain", first, PLAIN_PICTURES),
            open_clips(scenes, "clips", first, CLIPS),
        )
        kept_out = (
            open_pictures(scenes, "validation", VALIDATION_SEED, VALIDATION_PICTURES),
            open_clips(scenes, "validation-clips", VALIDATION_SEED, VALIDATION_CLIPS),
        )
        seen = open_seen(model, stores, run, "features")
        validation = open_seen(model, kept_out, run, "validation")
        train_reading(model, *seen, validation, replace(ReadingOptions(), seed=seed), run)
        save_weights(model, finished)
    load_weights(model, finished)


def main() -> int:
    """Read the command line and train what is not trained yet."""
    asked = read_training_command(__doc__, HERE)
    torch.set_num_threads(asked.threads)
    model = build_model(asked.seed)
    run_tower_stage(model, asked.scenes, asked.run, asked.seed)
    if asked.tower_only:
        return 0
    run_language_stage(model, asked.scenes, asked.run, asked.seed)
    write_checkpoint(model, asked.out)
    print(f"{asked.out}: checkpoint written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
