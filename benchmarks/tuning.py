"""How much of what a small token budget costs a tuned checkpoint wins back.

The pocket checkpoint is tuned with VisionZip at 32 of 576 tokens (1/18) on generated scenes, the
projector alone and with LoRA in the language model, and asked the held-out questions of
`benchmarks.accuracy` before and after, also with budgets it was not tuned for. Claim: the tuned
projector wins back at least half of what 32 tokens cost.

    python -m benchmarks.tuning --json
    python -m benchmarks.tuning --write docs/tuning.md

Scenes, features, checkpoints and measurements are kept under `build/tuning` and `build/accuracy`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from benchmarks.accuracy import Bench, Setting
from benchmarks.accuracy_report import Result, replace_between
from benchmarks.packed_answers import POCKET, Examination
from export.checkpoint.llava import open_checkpoint
from export.tracks import show_tracks
from export.tune.command import show_training
from export.tune.run import RECORD_FILE, TuneOptions, tune_checkpoint
from export.tune.student import Lora
from export.tune.training import Recipe

from conversations import write_conversations  # isort: skip - found by packed_answers

SEED, QUESTIONS = 3_000_000, 12
BUDGET, PATCHES = 32, 576
GOAL_SHARE = 0.5
MARK = "benchmarks.tuning"
_FOLDER = Path("build/tuning")

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint and what it answered.

    Attributes:
        name: what the table calls it.
        examination: the held-out questions, in the order of its answers.
        record: of its tuning; empty for the checkpoint it began with.
        cells: by reducer and budget.
    """

    name: str
    examination: Examination
    record: dict[str, Any]
    cells: dict[tuple[str, int], Result]


@app.command()
def main(
    pictures: Annotated[int, typer.Option(min=40, help="Generated scenes to learn from.")] = 4000,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA adapters.")] = 16,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    write: Annotated[Path | None, typer.Option(help="Page whose tables to replace.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Tune, and measure before and after."""
    torch.set_num_threads(threads)
    recipe = Recipe(epochs=epochs, validate_every=50)
    scenes = _FOLDER / f"scenes-{pictures}"
    if not (scenes / "conversations.json").exists():
        write_conversations(SEED, pictures, QUESTIONS, scenes)
    candidates = [measure("as it was", POCKET, {}, threads)]
    for name, lora in (("projector", None), (f"projector and LoRA {rank}", Lora(rank, 2 * rank))):
        out = _FOLDER / f"{'lora' if lora else 'projector'}-{pictures}-{epochs}"
        record = tune(scenes, out, lora, recipe)
        candidates.append(measure(name, out, record, threads))
    report = summarize(candidates)
    if write is not None:
        tables = (table_of_budgets(candidates), table_of_types(candidates))
        replace_between(write, MARK, "\n\n".join(tables))
    print(json.dumps(report) if as_json else table_of_budgets(candidates))
    raise typer.Exit(0 if report["met"] else 1)


def tune(scenes: Path, out: Path, lora: Lora | None, recipe: Recipe) -> dict[str, Any]:
    """Tune the pocket checkpoint unless that was done; return the record of the run."""
    if not (out / RECORD_FILE).exists():
        options = TuneOptions(
            model=str(POCKET),
            data=scenes / "conversations.json",
            images=scenes / "images",
            out=out,
            tokens=BUDGET,
            lora=lora,
            recipe=recipe,
            features=scenes / "features",
        )
        console = Console(stderr=True)
        with show_training(console) as progress:
            tune_checkpoint(options, show_tracks(console), progress)
    record: dict[str, Any] = json.loads((out / RECORD_FILE).read_text("utf-8"))
    return record


def measure(name: str, folder: Path, record: dict[str, Any], threads: int) -> Candidate:
    """Ask a checkpoint the held-out questions, with the budget it was tuned for and others."""
    examination = Examination(folder, POCKET / "test")
    bench = Bench(open_checkpoint(folder), examination, threads, fresh=False)
    asked = [("none", PATCHES), *(("visionzip", tokens) for tokens in (192, 128, 64, BUDGET))]
    cells = {}
    for reducer, tokens in track(asked, f"Asking: {name}", console=Console(stderr=True)):
        cells[reducer, tokens] = bench.measure(Setting(reducer, tokens, "fp32"))
    return Candidate(name, examination, record, cells)


def won_back(candidate: Candidate, before: Candidate) -> tuple[float, float, float]:
    """Return what share of the budget's cost was won back, and its 95 % interval over pictures."""
    full, small = before.cells["none", PATCHES].right, before.cells["visionzip", BUDGET].right
    tuned = candidate.cells["visionzip", BUDGET].right
    sums = np.stack([_by_picture(before, right) for right in (full, small, tuned)])
    draws = np.random.default_rng(0).integers(0, sums.shape[1], (2000, sums.shape[1]))
    a, b, c = (row[draws].sum(1) for row in sums)
    low, high = np.quantile((c - b) / (a - b), [0.025, 0.975])
    share = (tuned.sum() - small.sum()) / (full.sum() - small.sum())
    return float(share), float(low), float(high)


def _by_picture(candidate: Candidate, right: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.bincount(candidate.examination.picture_of, right).astype(np.float64)


def summarize(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Return everything for machines, and whether the projector kept the claim."""
    before, *tuned = candidates
    return {
        "questions": len(before.examination.types),
        "before": _shares(before),
        "tuned": [
            {
                "name": one.name,
                "exact": _shares(one),
                "won_back": [round(value, 3) for value in won_back(one, before)],
                **{key: one.record[key] for key in ("pictures", "steps", "processor_seconds")},
                "tuned_parameters": one.record["tuned_parameters"],
            }
            for one in tuned
        ],
        "met": won_back(tuned[0], before)[0] >= GOAL_SHARE,
    }


def _shares(candidate: Candidate) -> dict[str, float]:
    return {str(tokens): round(one.exact, 4) for (_, tokens), one in candidate.cells.items()}


def table_of_budgets(candidates: Sequence[Candidate]) -> str:
    """Return exact match by budget, and what each run took, as Markdown."""
    before = candidates[0]
    head = ["tuned", "numbers tuned", "pictures", "steps", "processor min"]
    head += [f"{tokens} tokens" for _, tokens in before.cells] + [f"won back at {BUDGET}"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for one in candidates:
        cells = [f"{result.exact:.1%}" for result in one.cells.values()]
        if not one.record:
            rows.append([one.name, "", "", "", "", *cells, ""])
            continue
        share, low, high = won_back(one, before)
        took = [f"{one.record[key]:,}" for key in ("tuned_parameters", "pictures", "steps")]
        minutes = f"{one.record['processor_seconds'] / 60:.1f}"
        rows.append([one.name, *took, minutes, *cells, f"{share:.0%} ({low:.0%} to {high:.0%})"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table_of_types(candidates: Sequence[Candidate]) -> str:
    """Return exact match by type of question, with all tokens before and the few ones after."""
    before = candidates[0]
    columns = [("all, as it was", before.cells["none", PATCHES])]
    columns += [(f"{BUDGET}, {one.name}", one.cells["visionzip", BUDGET]) for one in candidates]
    types = before.examination.types
    rows = [["question", *(name for name, _ in columns)], ["---", *["---:"] * len(columns)]]
    for name in dict.fromkeys(types.tolist()):
        mask = types == name
        rows.append([name, *(f"{result.right[mask].mean():.1%}" for _, result in columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    app()
