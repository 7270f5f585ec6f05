"""Measure a checkpoint: exact match per question type, on pictures and on clips.

    python models/pocket-onevision/pictures.py --seed 20261121 --count 1000 --out PICTURES
    python models/pocket-onevision/events.py --seed 20261121 --count 500 --out CLIPS
    python models/pocket-onevision/accuracy.py --pictures PICTURES --clips CLIPS --json report.json

A checkpoint and two folders with `questions.jsonl` enter; tables on stdout, and the same as JSON,
leave. Reducers are plain ones, over all views or frames at once; nothing is trained for them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paths  # noqa: F401 - makes pocket-llava's modules importable

import numpy as np  # isort: skip
import torch
from architecture import tower_of
from clips import FRAMES
from evaluate import describe, format_types, paired_interval, read_held_out, report_types
from events import CLIP_TYPES
from onevision import (
    TILE_GRID,
    TILE_PATCHES,
    TILES,
    VIEWS_TOKENS,
    clip_tokens,
    look,
    normalise,
    order_views,
    picture_tokens,
    place_newlines,
)
from onevision_checkpoint import open_processor
from pictures import PICTURE_TYPES, TILE_TYPES
from PIL import Image
from questions import Question
from reading_stage import CLIP_TOKENS, judge
from torch import Tensor
from torch.nn import functional
from transformers import LlavaOnevisionForConditionalGeneration

HERE = Path(__file__).resolve().parent
# A ninth of all tokens of a picture and of a clip, and half of that.
PICTURE_BUDGETS = (VIEWS_TOKENS // 9, VIEWS_TOKENS // 18)
CLIP_BUDGETS = (CLIP_TOKENS // 3, CLIP_TOKENS // 9)
_BATCH = 20


@dataclass(frozen=True)
class SeenKind:
    """Everything the tower saw of one kind of input, and what is asked about it.

    Attributes:
        features: float32[N, ...], what `tokens` takes.
        scores: float32[N, T], the attention each token's patch receives; -1 for newlines.
        asked: the questions about each picture or clip.
        types: what can be asked.
        tokens: returns visual tokens of features, of those kept.
    """

    features: Tensor
    scores: Tensor
    asked: list[list[Question]]
    types: Sequence[str]
    tokens: Callable[[Tensor, Tensor | None], Tensor]


def load_checkpoint(folder: Path) -> tuple[LlavaOnevisionForConditionalGeneration, Any]:
    """Load model (float32, plain attention) and processor of a checkpoint."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.set_attn_implementation("plain")
    return model.eval(), open_processor(folder)


@torch.no_grad()
def see_held_out_pictures(model: Any, processor: Any, folder: Path) -> SeenKind:
    """Run image processor and tower on every picture of a folder, in float32."""
    held_out = read_held_out(folder)
    source = place_newlines()
    features, scores = [], []
    for start in range(0, len(held_out.paths), _BATCH):
        files = held_out.paths[start : start + _BATCH]
        pictures = [Image.open(path).convert("RGB") for path in files]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        seen = look(tower_of(model), pixels.flatten(0, 1))
        features.append(order_views(seen.features.unflatten(0, (-1, 1 + TILES))))
        received = order_views(seen.received.unflatten(0, (-1, 1 + TILES))[..., None])[..., 0]
        scores.append(torch.where(source < 0, -1.0, received[:, source.clamp(min=0)]))
    return SeenKind(
        torch.cat(features),
        torch.cat(scores),
        held_out.questions,
        list(PICTURE_TYPES),
        lambda part, kept: picture_tokens(model, part, kept),
    )


@torch.no_grad()
def see_held_out_clips(model: Any, folder: Path) -> SeenKind:
    """Run the tower on every clip of a folder, in float32; its frames are as large as a tile."""
    held_out = read_held_out(folder, "clip")
    features, scores = [], []
    for path in held_out.paths:
        seen = look(tower_of(model), normalise(read_frames(path)))
        features.append(seen.features)
        plane = seen.received.unflatten(1, (TILE_GRID, TILE_GRID))
        pooled = functional.avg_pool2d(plane[:, None], 2).flatten()
        scores.append(functional.pad(pooled, (0, 1), value=-1.0))
    return SeenKind(
        torch.stack(features),
        torch.stack(scores),
        held_out.questions,
        list(CLIP_TYPES),
        lambda part, kept: clip_tokens(model, part, kept),
    )


def read_frames(folder: Path) -> Tensor:
    """Return the frames of a clip, uint8[FRAMES, 96, 96, 3]."""
    files = sorted(folder.glob("*.png"))[:FRAMES]
    return torch.from_numpy(np.stack([np.array(Image.open(file).convert("RGB")) for file in files]))


def top_received(scores: Tensor, budget: int) -> Tensor:
    """The tokens whose patches receive most attention, int64[B, budget] in order."""
    return scores.topk(budget, 1).indices.sort(1).values


def uniform(scores: Tensor, budget: int) -> Tensor:
    """Evenly spaced patches, no newlines, int64[B, budget]."""
    patches = (scores[0] >= 0).nonzero()[:, 0]
    steps = ((torch.arange(budget) + 0.5) * len(patches) / budget).long()
    return patches[steps].expand(len(scores), -1)


def random_tokens(scores: Tensor, budget: int) -> Tensor:
    """Patches drawn at random, others for every picture, the same ones every time."""
    generator = torch.Generator().manual_seed(budget)
    drawn = torch.rand(scores.shape, generator=generator).masked_fill(scores < 0, -1.0)
    return drawn.topk(budget, 1).indices.sort(1).values


REDUCERS = {"top_received": top_received, "uniform": uniform, "random": random_tokens}


def judge_kind(
    model: Any, seen: SeenKind, kept: Tensor | None = None, wrong: bool = False
) -> np.ndarray:
    """Return bool[questions]: which are answered exactly, with the tokens kept or all of them.

    Args:
        model: the checkpoint.
        seen: pictures or clips.
        kept: int64[N, K] tokens of each, or all of them.
        wrong: show the next one instead of the one asked about.
    """
    order = torch.arange(len(seen.features)).roll(-1 if wrong else 0)

    def tokens_of(part: slice) -> Tensor:
        return seen.tokens(seen.features[order[part]], None if kept is None else kept[part])

    return judge(model, tokens_of, seen.asked, _BATCH)


def report_kind(model: Any, seen: SeenKind, budgets: Sequence[int]) -> dict[str, Any]:
    """Measure one kind of input with all tokens, with the wrong input, and reduced."""
    right, blind = judge_kind(model, seen), judge_kind(model, seen, wrong=True)
    asked = [question for questions in seen.asked for question in questions]
    about = np.repeat(np.arange(len(seen.asked)), [len(questions) for questions in seen.asked])
    report: dict[str, Any] = {
        "count": len(seen.asked),
        "tokens": seen.scores.shape[1],
        "all": describe(right),
        "wrong_image": describe(blind),
        "types": report_types(seen.types, asked, right, blind),
        "reducers": {},
    }
    for budget in budgets:
        cells = {}
        for name, reduce in REDUCERS.items():
            reduced = judge_kind(model, seen, reduce(seen.scores, budget))
            kept = paired_interval(reduced, right, about, ratio=True)
            cells[name] = describe(reduced) | {"kept": kept}
        report["reducers"][str(budget)] = cells
    return report


def report_base(model: Any, seen: SeenKind) -> dict[str, Any]:
    """Measure what the base view alone gives, of the types that need a tile."""
    kept = torch.arange(TILE_PATCHES).expand(len(seen.features), -1)
    right = judge_kind(model, seen, kept)
    types = np.array([question.type for questions in seen.asked for question in questions])
    return {name: describe(right[types == name]) for name in TILE_TYPES}


@torch.no_grad()
def compare_generate(
    model: Any, processor: Any, pictures: Path, clips: Path, count: int
) -> dict[str, Any]:
    """Ask the first `count` questions of each kind through transformers' generate."""
    return {
        "pictures": _generate(model, processor, pictures, "image", count),
        "clips": _generate(model, processor, clips, "clip", count),
    }


def _generate(model: Any, processor: Any, folder: Path, about: str, count: int) -> list[bool]:
    held_out = read_held_out(folder, about)
    pairs = zip(held_out.paths, held_out.questions, strict=True)
    asked = [(path, question) for path, questions in pairs for question in questions][:count]
    verdicts = []
    for path, question in asked:
        kind = "image" if about == "image" else "video"
        content = [{"type": kind}, {"type": "text", "text": question.text}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        if kind == "image":
            inputs = dict(processor(text=prompt, images=Image.open(path), return_tensors="pt"))
        else:
            prompt = prompt.replace("<video>", "<video>" * CLIP_TOKENS)
            inputs = dict(processor.tokenizer(prompt, return_tensors="pt"))
            inputs["pixel_values_videos"] = normalise(read_frames(path))[None]
            inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        said = processor.tokenizer.decode(new, skip_special_tokens=True)
        verdicts.append(said == question.answer)
    return verdicts


def evaluate_checkpoint(
    checkpoint: Path, pictures: Path, clips: Path, generate: int
) -> dict[str, Any]:
    """Measure a checkpoint on held-out pictures and clips; see the module's text."""
    model, processor = load_checkpoint(checkpoint)
    seen = see_held_out_pictures(model, processor, pictures)
    moving = see_held_out_clips(model, clips)
    report = {
        "pictures": report_kind(model, seen, PICTURE_BUDGETS),
        "clips": report_kind(model, moving, CLIP_BUDGETS),
        "base_alone": report_base(model, seen),
    }
    if generate:
        said = compare_generate(model, processor, pictures, clips, generate)
        for kind, ours in (
            ("pictures", judge_kind(model, seen)),
            ("clips", judge_kind(model, moving)),
        ):
            same = np.array(said[kind]) == ours[: len(said[kind])]
            report[kind]["generate"] = {"count": len(same), "same_verdict": float(same.mean())}
    return report


def format_report(report: dict[str, Any]) -> str:
    """Format a report as the tables of the card, in Markdown."""
    lines: list[str] = []
    for kind in ("pictures", "clips"):
        part = report[kind]
        lines += format_types(part["types"], part["all"], part["wrong_image"]["exact"])
        lines += ["", f"| tokens of {part['tokens']} | " + " | ".join(REDUCERS) + " |"]
        lines.append("|---" * (len(REDUCERS) + 1) + "|")
        for budget, cells in part["reducers"].items():
            row = " | ".join(f"{cells[name]['exact']:.1%}" for name in REDUCERS)
            lines.append(f"| {budget} | {row} |")
        lines.append("")
    lines += ["| type | base view alone | with its tiles |", "|---|---|---|"]
    for name, cell in report["base_alone"].items():
        whole = report["pictures"]["types"][name]["exact"]
        lines.append(f"| {name} | {cell['exact']:.1%} | {whole:.1%} |")
    return "\n".join(lines)


def main() -> int:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=HERE)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--generate", type=int, default=0, help="questions to ask generate() too")
    parser.add_argument("--json", type=Path, help="write the whole report here")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = evaluate_checkpoint(
        options.checkpoint, options.pictures, options.clips, options.generate
    )
    print(format_report(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
