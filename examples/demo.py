"""`make demo`: build the bundled checkpoint for this CPU and ask it about a picture.

The bundle holds two vision graphs of the same tower, one that reduces 576 visual tokens to 64 and
one that does not; the picture is asked about through both, and what the first one kept of it is
drawn over it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from engines.bundle import open_bundle
from engines.progress_bar import show_progress
from export.build import build_bundle
from export.build.plan import BuildOptions
from runtime.language.generate import GenerationOptions
from runtime.model import Answer, Model, open_model
from runtime.vision import Pixels
from runtime.vision.overlay import save_overlay
from runtime.vision.pictures import load_picture

CHECKPOINT = Path("models/pocket-llava")
PICTURE = CHECKPOINT / "test/00000.png"
QUESTION = "How many boxes are there?"
BUNDLE = Path("build/demo")
OVERLAY = Path("build/demo-overlay.png")
SHORT = GenerationOptions(max_tokens=24)
STAGES = ("encode", "prefill", "decode", "total")


def main() -> None:
    """Build, ask with all tokens and with a ninth of them, draw."""
    options = BuildOptions(str(CHECKPOINT), BUNDLE, tokens=(64, "all"), overwrite=True)
    with show_progress() as progress:
        build_bundle(options, progress)
    bundle = open_bundle(BUNDLE)
    picture = load_picture(PICTURE)
    table = Table("visual tokens", "answer", *(f"{stage} ms" for stage in STAGES), box=SIMPLE)
    for graph in reversed(bundle.manifest.vision):
        with open_model(bundle, visual_tokens=graph.reducer.tokens) as model:
            answer = ask_warm(model, picture)
        times = (f"{answer.milliseconds[stage]:.1f}" for stage in STAGES)
        table.add_row(f"{answer.visual_tokens} ({graph.reducer.name})", answer.text, *times)
    save_overlay(OVERLAY, picture, answer.seen[0], bundle)
    console = Console()
    console.print(f"\n{PICTURE}: [bold]{QUESTION}[/bold]")
    console.print(table)
    console.print(f"What the {answer.visual_tokens} tokens kept of the picture: {OVERLAY}")
    console.print(
        f'Ask your own:  .venv/bin/python -m runtime.ask {BUNDLE} {PICTURE} "{QUESTION}"',
        soft_wrap=True,
    )


def ask_warm(model: Model, picture: Pixels) -> Answer:
    """Return the median of seven answers, each after a black frame.

    A robot's engine is warm, and its picture is never the one that was read before.
    """
    answers = []
    for _ in range(7):
        model.ask(np.zeros_like(picture), QUESTION, SHORT)
        answers.append(model.ask(picture, QUESTION, SHORT))
    return sorted(answers, key=lambda answer: answer.milliseconds["total"])[3]


if __name__ == "__main__":
    main()
