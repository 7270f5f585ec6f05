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

from export import BuildOptions, build_bundle
from runtime import ask, open_bundle, open_model

CHECKPOINT = Path("models/pocket-llava")
PICTURE = CHECKPOINT / "test/00000.png"
QUESTION = "How many boxes are there?"
BUNDLE = Path("build/demo")
OVERLAY = Path("build/demo-overlay.png")
STAGES = ("encode", "prefill", "decode", "total")
BLACK = np.zeros((336, 336, 3), np.uint8)


def main() -> None:
    """Build, ask with all tokens and with a ninth of them, draw."""
    console = Console()
    options = BuildOptions(str(CHECKPOINT), BUNDLE, tokens=(64, "all"), overwrite=True)
    with Console(stderr=True).status("Starting") as status:
        build_bundle(options, lambda line, done: status.update(f"{done:4.0%}  {line}"))
    bundle = open_bundle(BUNDLE)
    table = Table("visual tokens", "answer", *(f"{stage} ms" for stage in STAGES), box=SIMPLE)
    for graph in reversed(bundle.manifest.vision):
        answers = []
        with open_model(bundle, visual_tokens=graph.reducer.tokens) as model:
            for _ in range(7):  # a robot's engine is warm, and its picture never the one before
                model.ask(BLACK, QUESTION)
                answers.append(model.ask(PICTURE, QUESTION))
        answer = sorted(answers, key=lambda answer: answer.milliseconds["total"])[3]
        times = (f"{answer.milliseconds[stage]:.1f}" for stage in STAGES)
        table.add_row(f"{answer.visual_tokens} ({graph.reducer.name})", answer.text, *times)
    ask(BUNDLE, PICTURE, QUESTION, overlay=OVERLAY)
    console.print(f"\n{PICTURE}: [bold]{QUESTION}[/bold]")
    console.print(table)
    console.print(f"What the {answer.visual_tokens} tokens kept of the picture: {OVERLAY}")
    console.print(
        f'Ask your own:  .venv/bin/python -m runtime.ask {BUNDLE} {PICTURE} "{QUESTION}"',
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
