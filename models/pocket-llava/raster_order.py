"""Train the language model on with every picture as LLaVA reads it: all tokens, in raster order.

The checkpoint here was trained with shuffled tokens and random gaps, so it reads places from
features alone and cannot tell what the positions of its tokens are worth. This goes on from it,
without the shuffle, the gaps and the dropped patches; `benchmarks.positions` measures the result.

    python models/pocket-llava/raster_order.py --out build/raster-order
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # do not burn a shared core while waiting
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from answering import answer_logits
from architecture import tower_of
from checkpoint import write_checkpoint
from evaluate import load_checkpoint
from language_stage import LanguageOptions, open_validation, see
from layout import objects_from_array
from packing import pack
from questions import TYPES, choose_questions
from scene_store import SceneStore, open_store
from scenes import SEED_STRIDE, TRAIN_SEED, VALIDATION_SEED
from torch import nn
from torch.nn import functional
from train import PLAIN_SCENES, VALIDATION_SCENES
from training_loop import build_optimizer, learning_rate_at, take_step
from training_state import ProgressLog
from transformers import LlavaForConditionalGeneration

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class RasterOptions:
    """How the training goes on.

    Attributes:
        steps: batches; no picture is seen twice.
        batch: pictures of one.
        learning_rate: the highest; it rises once and falls.
        warmup_steps: in which it rises.
        seed: of the scenes and of what is asked about them; the checkpoint's own scenes are 0's.
    """

    steps: int = 700
    batch: int = 10
    learning_rate: float = 1e-3
    warmup_steps: int = 40
    seed: int = 1


def train_in_raster_order(
    model: LlavaForConditionalGeneration,
    store: SceneStore,
    options: RasterOptions,
    log: ProgressLog,
) -> None:
    """Train projector and language model in place; the tower stays as it is."""
    asking = LanguageOptions()
    modules = nn.ModuleDict(
        {"projector": model.model.multi_modal_projector, "llm": model.model.language_model}
    )
    optimizer = build_optimizer(modules, options.learning_rate, asking.weight_decay)
    weights = asking.rounds[0].type_weights
    for step in range(options.steps):
        rng = np.random.default_rng((options.seed, 30, step))
        progress = step / options.steps
        part = slice(step * options.batch, (step + 1) * options.batch)
        tokens = see(tower_of(model), store.images[part]).features[:, 1:]
        questions = [
            choose_questions(
                objects_from_array(row), asking.questions_per_image, weights, rng, TYPES
            )
            for row in store.objects[part]
        ]
        text = pack(questions, rng, asking.chained_share)
        system = bool(rng.random() < asking.system_prompt_share)
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets = answer_logits(model, tokens, text, with_system_prompt=system)
        loss = functional.cross_entropy(logits, targets)
        rate = learning_rate_at(progress, step, options.learning_rate, options.warmup_steps)
        take_step(modules, optimizer, loss, rate)
        log.record(step + 1, len(tokens), {"answers": loss}, f"{(step + 1) / options.steps:.1%}")


def main() -> int:
    """Read the command line, train, and write the checkpoint."""
    defaults = RasterOptions()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=HERE, help="checkpoint to go on from")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes")
    parser.add_argument("--scenes", type=Path, default=HERE / "run-scenes")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = RasterOptions(steps=given.steps, learning_rate=given.learning_rate)
    first = TRAIN_SEED + SEED_STRIDE * options.seed + 1
    store = open_store(given.scenes, "plain", first, PLAIN_SCENES)
    seen = open_store(given.scenes, "validation", VALIDATION_SEED, VALIDATION_SCENES)
    model = load_checkpoint(given.model)[0]
    model.set_attn_implementation("plain")
    validation = open_validation(tower_of(model), seen, 50)
    log = ProgressLog(given.out / "log.jsonl", "raster order")
    log.write({"validation": validation.measure(model, 50)})
    train_in_raster_order(model, store, options, log)
    log.write({"validation": validation.measure(model, 50)})
    write_checkpoint(model, given.out)
    print(f"{given.out}: checkpoint written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
