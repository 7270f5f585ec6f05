"""How many visual tokens are enough: every reducer from 64 tokens down to 8.

The tower of each checkpoint runs once on each picture; each reducer chooses from what it made, and
the language model answers every question (`benchmarks.packed_answers`). All of it is the modules
that `export.build` traces, in PyTorch and float32; `benchmarks.accuracy` runs exported graphs, in
several precisions. Random and uniform patches are always beside, and the share of patches that
resemble a kept token, which needs no labels.

    python -m benchmarks.few_tokens --write docs/accuracy.md
    python -m benchmarks.few_tokens --model DIR --model DIR --data PICTURES --section held-out

Results are kept under `build/few_tokens`, so an interrupted run continues where it stood.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.accuracy_report import replace_between
from benchmarks.few_tokens_report import Answers, Column, table_from_columns
from benchmarks.packed_answers import POCKET, Examination
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.reducers import Reduced, Reducer, make_reducer, reducer_for_budget
from export.reducers.selection import unit_rows
from export.towers import Scoring, TowerOutput, without_scores
from export.vision.vision_module import VisionModule, build_vision_module
from runtime.vision.pictures import load_picture
from runtime.vision.preprocess import preprocess_batch

BUDGETS = (64, 32, 16, 12, 8)
REDUCERS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "uniform": ("uniform", {}),
    "top_attention": ("top_attention", {}),
    "visionzip": ("visionzip", {}),
    "divprune": ("divprune", {}),
    "scope, alpha 0": ("scope", {"alpha": 0.0}),
    "scope, alpha 1": ("scope", {"alpha": 1.0}),
    "scope": ("scope", {}),
    "scope, 4 picks a step": ("scope", {"picks_per_step": 4}),
    "scope, nearest merged": ("scope", {"merge": "nearest"}),
    "divprune, nearest merged": ("divprune", {"merge": "nearest"}),
}
"""What the table calls a reducer -> its registry name and options; alpha is 0.5 unless it says."""
COVERAGES = (0.7, 0.75, 0.8, 0.85)
"""Of `scope` with at most `BUDGETS[0]` tokens."""
ALIKE = 0.95
"""The cosine from which on a patch counts as covered by a token."""
_PICTURES_AT_ONCE = 25
_KEPT = Path("build/few_tokens")

app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: Annotated[
        list[Path] | None, typer.Option(help="Checkpoint of the pocket architecture; repeatable.")
    ] = None,
    data: Annotated[Path, typer.Option(help="Pictures and questions.jsonl.")] = POCKET / "test",
    reducers: Annotated[
        str,
        typer.Option(help="Rows, a semicolon between them; `coverage`: those by content."),
    ] = ";".join([*REDUCERS, "coverage"]),
    tokens: Annotated[str, typer.Option(help="Comma between them.")] = ",".join(map(str, BUDGETS)),
    threads: Annotated[int, typer.Option(min=1)] = 1,
    section: Annotated[str, typer.Option(help="Which table of the page to replace.")] = "test",
    write: Annotated[Path | None, typer.Option(help="Page to write the table to.")] = None,
) -> None:
    """Measure exact match for every row on every checkpoint."""
    torch.set_num_threads(threads)
    budgets = [int(word) for word in tokens.split(",")]
    columns = [
        measure_checkpoint(one, data, reducers.split(";"), budgets) for one in model or [POCKET]
    ]
    table = table_from_columns(columns)
    if write is not None:
        replace_between(write, f"benchmarks.few_tokens: {section}", table)
    print(table)


def list_rows(
    names: Sequence[str], budgets: Sequence[int], checkpoint: Checkpoint
) -> Iterator[tuple[str, int, Reducer]]:
    """Yield each row's name, budget and reducer, all tokens first."""
    patches = checkpoint.patch_side**2
    yield "none", patches, make_reducer("none", class_token=checkpoint.keeps_class_token)
    for budget in budgets:
        for name in names:
            if name != "coverage":
                kind, options = REDUCERS[name]
                yield name, budget, reducer_for_budget(kind, budget, patches, **options)
    for share in COVERAGES if "coverage" in names else ():
        reducer = reducer_for_budget("scope", BUDGETS[0], patches, coverage=share)
        yield f"scope, coverage {share}", BUDGETS[0], reducer


def measure_checkpoint(
    model: Path, data: Path, names: Sequence[str], budgets: Sequence[int]
) -> Column:
    """Return every row of one checkpoint, measured now unless it was before."""
    checkpoint, examination = open_checkpoint(str(model)), Examination(model, data)
    file = _KEPT / f"{_digest(checkpoint, data)}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    kept = {(one.reducer, one.tokens): one for one in map(Answers.from_line, lines)}
    rows = list(list_rows(names, budgets, checkpoint))
    if missing := [row for row in rows if row[:2] not in kept]:
        graph = build_vision_module(checkpoint, rows[0][2])
        tower = see_pictures(checkpoint, examination)
        for name, tokens, reducer in track(missing, str(model), console=Console(stderr=True)):
            one = answer_with(graph, tower, examination, (name, tokens, reducer))
            with file.open("a", encoding="utf-8") as out:
                out.write(one.to_line() + "\n")
            kept[name, tokens] = one
    return Column(
        model.resolve().name, [kept[name, tokens] for name, tokens, _ in rows], examination
    )


@torch.no_grad()
def see_pictures(checkpoint: Checkpoint, examination: Examination) -> list[TowerOutput]:
    """Return what the tower makes of the pictures, with scores, in batches."""
    graph = build_vision_module(checkpoint, make_reducer("top_attention", budget=1))
    batches = []
    for start in range(0, len(examination.pictures), _PICTURES_AT_ONCE):
        files = examination.pictures[start : start + _PICTURES_AT_ONCE]
        pixels = preprocess_batch([load_picture(file) for file in files], checkpoint.preprocessing)
        batches.append(graph.tower(torch.from_numpy(pixels)))
    return batches


@torch.no_grad()
def answer_with(
    graph: VisionModule,
    tower: Sequence[TowerOutput],
    examination: Examination,
    row: tuple[str, int, Reducer],
) -> Answers:
    """Reduce what the tower made, and let the language model answer."""
    name, budget, reducer = row
    tokens, valid, covered = [], [], []
    for batch in tower:
        given = batch
        if reducer.scoring is Scoring.NONE:
            given = without_scores(batch.features, batch.class_token)
        reduced = reducer(given)
        covered.append(share_covered(batch.features, reduced))
        valid.append(reduced.valid)
        tokens.append(graph.projector(reduced.tokens))
    real: NDArray[np.int64] = torch.cat(valid).numpy()
    visual = torch.cat(tokens)[:, : int(real.max())].numpy()
    right = examination.right_answers(visual, real)
    covers = float(torch.cat(covered).mean())
    return Answers(name, budget, float(real.mean()), int(real.max()), covers, right)


def share_covered(features: Tensor, reduced: Reduced) -> Tensor:
    """Return the share of each picture's patches with a token of cosine `ALIKE` or more.

    Args:
        features: float32[B, P, D].
        reduced: of the same pictures.

    Returns:
        float32[B].
    """
    cosine = unit_rows(reduced.tokens) @ unit_rows(features).transpose(1, 2)  # [B, N, P]
    return (cosine.amax(dim=1) >= ALIKE).float().mean(dim=1)


def _digest(checkpoint: Checkpoint, data: Path) -> str:
    """Return a name for what is measured: weights, configuration, pictures, questions."""
    digest = hashlib.sha256()
    files = [checkpoint.root / name for name in ("model.safetensors", "config.json")]
    for file in [*files, data / "questions.jsonl", *sorted(data.glob("*.png"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    app()
