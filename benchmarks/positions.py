"""What original positions of visual tokens are worth, and a bias by how many patches each is of.

A checkpoint answers every question with its tokens one after the other (`compact`), each where it
would stand if none had been dropped (`original`), and, where a reducer merges, with log(patches) of
each token added to the scores of attention to it (RESTORE, arXiv 2606.01711). All of it is PyTorch
in float32 (`benchmarks.packed_answers`). The bundled checkpoint was trained with shuffled tokens
and random gaps; one that was not shows what positions mean to a LLaVA:

    python models/pocket-llava/raster_order.py --out build/raster-order
    python models/pocket-llava/scenes.py --seed 20260712 --count 300 --out build/held-out
    python -m benchmarks.positions --model build/raster-order --data build/held-out
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from benchmarks.accuracy_report import replace_between
from benchmarks.few_tokens import REDUCERS, list_rows, see_pictures
from benchmarks.packed_answers import POCKET, Examination, Layout
from export.checkpoint.llava import open_checkpoint
from export.reducers import Reducer
from export.towers import Scoring, TowerOutput, without_scores
from export.vision.vision_module import VisionModule, build_vision_module
from runtime.vision import VisualTokens
from runtime.vision.places import patches_of, placed_tokens

from evaluate import paired_interval, wilson_interval  # isort: skip - found by packed_answers

NAMES = ("random", "uniform", "visionzip", "scope", "scope, nearest merged")
MERGING = ("visionzip", "scope, nearest merged")
BUDGETS = (64, 32, 16)
PLACE_TYPES = ("where", "left_of", "nearest")
"""Questions whose answer is a place."""
_HEAD = ("tokens", "reducer", "positions", "exact match (95 %)", "points over compact (95 %)",
         "of place", "points over compact (95 %)")  # fmt: skip

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Measured:
    """One row of the table: bool[Q], which questions were answered exactly."""

    tokens: int
    reducer: str
    positions: str
    right: NDArray[np.bool_]


@app.command()
def main(
    model: Annotated[list[Path] | None, typer.Option(help="Checkpoint; repeatable.")] = None,
    data: Annotated[Path, typer.Option(help="Pictures and questions.jsonl.")] = POCKET / "test",
    pictures: Annotated[int | None, typer.Option(min=1, help="The first so many only.")] = None,
    reducers: Annotated[str, typer.Option(help="A semicolon between them.")] = ";".join(NAMES),
    tokens: Annotated[str, typer.Option(help="Comma between them.")] = ",".join(map(str, BUDGETS)),
    threads: Annotated[int, typer.Option(min=1)] = 1,
    write: Annotated[Path | None, typer.Option(help="Page to write the tables to.")] = None,
) -> None:
    """Measure exact match in every way of standing, for every reducer and budget."""
    torch.set_num_threads(threads)
    budgets = [int(word) for word in tokens.split(",")]
    for one in model or [POCKET]:
        examination = Examination(one, data, pictures)
        rows = list(measure(one, examination, reducers.split(";"), budgets))
        table = table_from_rows(rows, examination)
        if write is not None:
            replace_between(write, f"benchmarks.positions: {one.resolve().name}", table)
        print(table)


def measure(
    model: Path, examination: Examination, names: Sequence[str], budgets: Sequence[int]
) -> Iterator[Measured]:
    """Yield every row of a checkpoint, for each reducer the compact one first."""
    if unknown := set(names) - REDUCERS.keys():
        raise typer.BadParameter(f"There is no row {', '.join(unknown)}: {', '.join(REDUCERS)}.")
    checkpoint = open_checkpoint(str(model))
    rows = list(list_rows(names, budgets, checkpoint))
    graph = build_vision_module(checkpoint, rows[0][2])
    tower = see_pictures(checkpoint, examination)
    for name, budget, reducer in track(rows, str(model), console=Console(stderr=True)):
        seen = reduce_pictures(graph, tower, reducer)
        compact = np.tile(np.arange(seen.tokens.shape[1]), (len(seen.tokens), 1))
        original, length = places_of(seen, checkpoint.patch_side)
        none = np.zeros(original.shape, np.float32)
        ways: dict[str, Layout | None] = {"compact": None}
        if name in MERGING:
            bias = np.log(patches_of(seen)).astype(np.float32)
            ways["compact, bias"] = Layout(compact, seen.tokens.shape[1], bias)
        if name != "none":  # of all tokens both are the same
            ways["original"] = Layout(original, length, none)
        if name in MERGING:
            ways["original, bias"] = Layout(original, length, bias)
        for way, layout in ways.items():
            right = examination.right_answers(seen.tokens, seen.valid, layout)
            yield Measured(budget, name, way, right)


@torch.no_grad()
def reduce_pictures(
    graph: VisionModule, tower: Sequence[TowerOutput], reducer: Reducer
) -> VisualTokens:
    """Return the visual tokens of every picture."""
    made: list[tuple[Any, ...]] = []
    for batch in tower:
        given = batch
        if reducer.scoring is Scoring.NONE:
            given = without_scores(batch.features, batch.class_token)
        reduced = reducer(given)
        tokens = graph.projector(reduced.tokens)
        made.append((tokens, reduced.valid, reduced.origin, reduced.assignment))
    tokens, valid, origin, assignment = (torch.cat(one).numpy() for one in zip(*made, strict=True))
    return VisualTokens(tokens, valid, origin, assignment, milliseconds={})


def places_of(seen: VisualTokens, columns: int) -> tuple[NDArray[np.int64], int]:
    """Return original places, int64[pictures, N], and how many positions a picture takes."""
    placed = [placed_tokens(seen, at, columns) for at in range(len(seen.tokens))]
    places = np.zeros(seen.origin.shape, np.int64)
    for row, one in zip(places, placed, strict=True):
        row[: len(one)] = one.places
    return places, placed[0].length


def table_from_rows(rows: Sequence[Measured], asked: Examination) -> str:
    """Return what was asked and a Markdown table."""
    of_place = np.isin(asked.types, PLACE_TYPES)
    lines: list[tuple[str, ...]] = [_HEAD, ("---:", "---", "---", "---:", "---:", "---:", "---:")]
    compact: dict[tuple[int, str], NDArray[np.bool_]] = {}
    for row in rows:
        beside = compact.setdefault((row.tokens, row.reducer), row.right)
        cells = [str(row.tokens), row.reducer, row.positions]
        for chosen in (np.ones_like(of_place), of_place):
            right, other = row.right[chosen], beside[chosen]
            low, high = (100 * end for end in wilson_interval(int(right.sum()), len(right)))
            cells.append(f"{right.mean():.1%} ({low:.1f} to {high:.1f})")
            cells.append("")
            if row.positions != "compact":
                low, high = paired_interval(right, other, asked.picture_of[chosen])
                points = 100 * (right.mean() - other.mean())
                cells[-1] = f"{points:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        lines.append(tuple(cells))
    told = (
        f"{len(asked.types):,} questions about {len(asked.pictures):,} pictures, "
        f"{of_place.sum():,} of them of place ({', '.join(PLACE_TYPES)}), float32."
    )
    return told + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    app()
