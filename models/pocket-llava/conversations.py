"""Rendered scenes as LLaVA-format conversations, for `python -m export.tune`.

A seed enters; `DIR/conversations.json` and `DIR/images/*.png` leave. Every question is a
conversation of its own, as the checkpoint was trained: an answer never leans on the one before.

    python models/pocket-llava/conversations.py --seed 3000000 --count 2000 --out DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from questions import TYPES, choose_questions
from scenes import generate_scene


def write_conversations(seed: int, count: int, questions: int, out: Path) -> int:
    """Write `count` pictures and up to `questions` conversations about each.

    Returns:
        The number of conversations.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    entries = []
    for index in range(count):
        layout, image, _ = generate_scene(seed, index)
        name = f"{index:05d}.png"
        Image.fromarray(image).save(out / "images" / name, compress_level=1)
        rng = np.random.default_rng((seed, index, 1))
        for number, asked in enumerate(choose_questions(layout.objects, questions, {}, rng, TYPES)):
            turns = [
                {"from": "human", "value": f"<image>\n{asked.text}"},
                {"from": "gpt", "value": asked.answer},
            ]
            entries.append({"id": f"{index:05d}-{number}", "image": name, "conversations": turns})
    (out / "conversations.json").write_text(json.dumps(entries, indent=0), encoding="utf-8")
    return len(entries)


def main() -> int:
    """Read the command line and write pictures and conversations."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--questions", type=int, default=12, help="most about a picture")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    asked = write_conversations(options.seed, options.count, options.questions, options.out)
    print(f"{options.out}: {options.count} pictures, {asked} conversations", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
