"""Measure a checkpoint: exact match per question type, for every reducer and token budget.

    python models/pocket-llava/scenes.py --seed 20260712 --count 1000 --out DIR
    python models/pocket-llava/evaluate.py --data DIR --json report.json

A checkpoint and a folder of pictures with `questions.jsonl` enter; a table on stdout, and the same
as JSON, leave. Reducers are the plain ones of `reducers.py`; nothing is trained for them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answering import right_answers
from architecture import TOWER_HEADS, look, tiles_from_pixels, tower_of
from packing import pack
from PIL import Image
from questions import TYPES, Question
from reducers import REDUCERS, SeenBatch, all_patches
from transformers import AutoProcessor, LlavaForConditionalGeneration

HERE = Path(__file__).resolve().parent
BUDGETS = (192, 128, 64, 32)
_BATCH = 50


@dataclass(frozen=True)
class HeldOut:
    """Pictures and the questions asked about each, in the same order."""

    paths: list[Path]
    questions: list[list[Question]]


def read_held_out(folder: Path, about: str = "image") -> HeldOut:
    """Read a folder that `scenes.py` wrote; `about` is the name of a row's file or folder."""
    per_image: dict[str, list[Question]] = defaultdict(list)
    for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        per_image[row[about]].append(Question(row["type"], row["question"], row["answer"]))
    return HeldOut([folder / name for name in per_image], list(per_image.values()))


def load_checkpoint(folder: Path) -> tuple[LlavaForConditionalGeneration, Any]:
    """Load model (float32, plain attention) and processor of a checkpoint."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.set_attn_implementation("plain")
    return model.eval(), AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def see_pictures(
    model: LlavaForConditionalGeneration, processor: Any, paths: Sequence[Path]
) -> SeenBatch:
    """Run the processor and the tower on every picture, in float32."""
    parts = []
    for start in range(0, len(paths), _BATCH):
        pictures = [Image.open(path).convert("RGB") for path in paths[start : start + _BATCH]]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        tiles = tiles_from_pixels(pixels).flatten(1, 2)
        places = torch.arange(tiles.shape[1]).expand(len(tiles), -1)
        seen = look(tower_of(model), tiles, places)
        keys = seen.keys.unflatten(-1, (TOWER_HEADS, -1)).mean(2)
        parts.append(SeenBatch(seen.features, seen.attention.sum(1), keys))
    return SeenBatch(
        torch.cat([part.features for part in parts]),
        torch.cat([part.scores for part in parts]),
        torch.cat([part.keys for part in parts]),
    )


def judge(
    model: LlavaForConditionalGeneration,
    seen: SeenBatch,
    held_out: HeldOut,
    reducer: str = "all",
    budget: int = 576,
    wrong_image: bool = False,
) -> np.ndarray:
    """Return bool[questions], in order: which are answered exactly.

    Args:
        model: the checkpoint.
        seen: what the tower made of every picture.
        held_out: the pictures' questions.
        reducer: a key of `REDUCERS`, or "all".
        budget: tokens the reducer may hand on.
        wrong_image: show the next picture instead of the one asked about.
    """
    reduce = REDUCERS.get(reducer, all_patches)
    order = torch.arange(len(seen.features)).roll(-1 if wrong_image else 0)
    right = []
    for start in range(0, len(order), _BATCH):
        index = order[start : start + _BATCH]
        part = SeenBatch(seen.features[index], seen.scores[index], seen.keys[index])
        text = pack(held_out.questions[start : start + _BATCH])
        right.append(right_answers(model, reduce(part, budget), text).numpy())
    return np.concatenate(right)


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share."""
    z = 1.959964
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count**2)) ** 0.5
    return middle - half, middle + half


def describe(right: np.ndarray) -> dict[str, Any]:
    """Return share, interval and count of a set of answers."""
    low, high = wilson_interval(int(right.sum()), len(right))
    interval = [round(low, 4), round(high, 4)]
    return {"exact": round(float(right.mean()), 4), "interval": interval, "count": len(right)}


def paired_interval(
    first: np.ndarray, second: np.ndarray, picture: np.ndarray, ratio: bool = False
) -> list[float]:
    """Return the 95 % bootstrap interval, over pictures, of first - second or first / second."""
    count = int(picture.max()) + 1
    sums = np.stack([np.bincount(picture, x, count) for x in (first, second, np.ones(len(first)))])
    draws = np.random.default_rng(0).integers(0, count, (2000, count))
    a, b, total = (row[draws].sum(1) for row in sums)
    values = a / b if ratio else (a - b) / total
    return [round(float(value), 4) for value in np.quantile(values, [0.025, 0.975])]


def report_types(
    names: Iterable[str], asked: Sequence[Question], right: np.ndarray, wrong_image: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return exact match, interval and baselines of each type.

    Args:
        names: the types.
        asked: every question.
        right: bool[questions], which were answered exactly.
        wrong_image: the same where another picture was shown.
    """
    types = np.array([question.type for question in asked])
    report = {}
    for name in names:
        mask = types == name
        answers = Counter(question.answer for question in asked if question.type == name)
        report[name] = {
            **describe(right[mask]),
            "majority": round(answers.most_common(1)[0][1] / mask.sum(), 4),
            "wrong_image": round(float(wrong_image[mask].mean()), 4),
        }
    return report


def evaluate(checkpoint: Path, data: Path, generate: int) -> dict[str, Any]:
    """Measure a checkpoint on a folder of pictures; see the module's text."""
    model, processor = load_checkpoint(checkpoint)
    held_out = read_held_out(data)
    seen = see_pictures(model, processor, held_out.paths)
    lengths = [len(questions) for questions in held_out.questions]
    picture = np.repeat(np.arange(len(lengths)), lengths)
    everything = judge(model, seen, held_out)
    blind = judge(model, seen, held_out, wrong_image=True)
    asked = [question for questions in held_out.questions for question in questions]
    report: dict[str, Any] = {
        "pictures": len(lengths),
        "all": describe(everything),
        "wrong_image": describe(blind),
        "types": report_types(TYPES, asked, everything, blind),
        "reducers": {},
    }
    for budget in BUDGETS:
        right = {name: judge(model, seen, held_out, name, budget) for name in REDUCERS}
        zipped = right["visionzip"]
        report["reducers"][str(budget)] = {name: describe(r) for name, r in right.items()} | {
            "visionzip_kept": paired_interval(zipped, everything, picture, ratio=True),
            "visionzip_over_uniform": paired_interval(zipped, right["uniform"], picture),
            "visionzip_over_random": paired_interval(zipped, right["random"], picture),
        }
        if budget == 64:
            report["types_visionzip_64"] = report_types(TYPES, asked, zipped, blind)
    if generate:
        report["generate"] = compare_generate(model, processor, held_out, everything, generate)
    return report


@torch.no_grad()
def compare_generate(
    model: Any,
    processor: Any,
    held_out: HeldOut,
    right: np.ndarray,
    count: int,
) -> dict[str, Any]:
    """Ask the first `count` questions through transformers' generate, and compare the verdicts."""
    asked = [
        (path, question)
        for path, questions in zip(held_out.paths, held_out.questions, strict=True)
        for question in questions
    ][:count]
    verdicts = []
    for path, question in asked:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=prompt, images=Image.open(path), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        verdicts.append(processor.decode(new, skip_special_tokens=True) == question.answer)
    return {
        "count": len(asked),
        "exact": round(float(np.mean(verdicts)), 4),
        "same_verdict": round(float((np.array(verdicts) == right[: len(asked)]).mean()), 4),
    }


def format_types(
    types: dict[str, dict[str, Any]], whole: dict[str, Any], wrong_image: float
) -> list[str]:
    """Format the accuracy of each type, and of all, as lines of a Markdown table."""
    lines = ["| type | exact match | 95 % interval | majority | wrong image | questions |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in {**types, "**all**": whole}.items():
        low, high = row["interval"]
        blind = row.get("wrong_image", wrong_image)
        majority = f"{row['majority']:.1%}" if "majority" in row else ""
        lines.append(
            f"| {name} | {row['exact']:.1%} | {low:.1%} to {high:.1%} | {majority} "
            f"| {blind:.1%} | {row['count']} |"
        )
    return lines


def format_report(report: dict[str, Any]) -> str:
    """Format a report as the tables of the card, in Markdown."""
    lines = format_types(report["types"], report["all"], report["wrong_image"]["exact"])
    lines += ["", "| tokens | " + " | ".join(REDUCERS) + " |", "|---" * (len(REDUCERS) + 1) + "|"]
    for budget, cells in report["reducers"].items():
        row = " | ".join(f"{cells[name]['exact']:.1%}" for name in REDUCERS)
        lines.append(f"| {budget} | {row} |")
    return "\n".join(lines)


def main() -> int:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=HERE)
    parser.add_argument("--data", type=Path, default=HERE / "test")
    parser.add_argument("--generate", type=int, default=0, help="questions to ask generate() too")
    parser.add_argument("--json", type=Path, help="write the whole report here")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = evaluate(options.checkpoint, options.data, options.generate)
    print(format_report(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
