"""A picture in tiles with few tokens: one budget shared by content, or a budget for each square.

The tower of a checkpoint of the pocket-onevision architecture sees the squares of each held-out
picture once. Every reducer chooses from what it made, the runtime puts the tokens in order with
their newlines, and the language model answers every question (`benchmarks.packed_answers`). All of
it is what `export.build --picture-tokens` and `--tokens` build, in PyTorch and float32.

A budget for each square is an equal share of the same total; where it does not divide evenly, the
first squares, the whole view ahead of all, have one token more. So have `random`, with three seeds,
and `uniform`, which cannot share by content. Budgets do not count newlines; "tokens used" does.

    python models/pocket-onevision/pictures.py --seed 20261121 --count 1000 --out build/pictures
    python -m benchmarks.shared_budget --data build/pictures
    python -m benchmarks.shared_budget --data build/pictures --model RUN/checkpoint --newlines none
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from transformers import LlavaOnevisionForConditionalGeneration

from benchmarks.packed_answers import Examination
from engines.errors import OptionError
from engines.picture_tiles import Newlines
from export.build.tiles import tiles_of
from export.checkpoint.llava import Checkpoint, open_checkpoint
from export.reducers import REDUCERS as KINDS
from export.reducers import Reducer, make_reducer, reducer_for_budget
from export.towers import Scoring, TowerOutput, without_scores
from export.vision.vision_module import VisionModule, build_vision_module
from runtime.vision import VisualTokens
from runtime.vision.layouts.layout import Size
from runtime.vision.layouts.llava_next import LlavaNext
from runtime.vision.parallel_resize import ALONE
from runtime.vision.pictures import load_picture

from evaluate import paired_interval, wilson_interval  # isort: skip - found by packed_answers

ONEVISION = Path(__file__).resolve().parents[1] / "models" / "pocket-onevision"
BUDGETS = (82, 64, 32, 16)
"""The first is a ninth of the 744 tokens of a picture."""
REDUCERS: dict[str, tuple[str, dict[str, Any]]] = {
    "scope": ("scope", {}),
    "scope, alpha 0": ("scope", {"alpha": 0.0}),
    "divprune": ("divprune", {}),
    "top_attention": ("top_attention", {}),
    "visionzip": ("visionzip", {}),
    "uniform": ("uniform", {"layout": "sequential"}),
    **{f"random, seed {seed}": ("random", {"seed": seed}) for seed in range(3)},
}
"""What the table calls a reducer -> its registry name and options; alpha is 0.5 unless it says."""
_PICTURES_AT_ONCE = 20

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Row:
    """A way to leave few tokens.

    Attributes:
        reducer: a name of `REDUCERS`, or "none".
        budget: tokens of a picture, newlines not counted; 0 for all of them.
        shared: by content; else each square has an equal share.
    """

    reducer: str
    budget: int
    shared: bool


@dataclass
class Measured:
    """What a row gave.

    Attributes:
        used: int64 of each picture, its visual tokens with newlines.
        of_view: int64 of each picture, those of the view of the whole.
        right: bool[Q]; which questions were answered exactly.
    """

    used: NDArray[np.int64]
    of_view: NDArray[np.int64]
    right: NDArray[np.bool_]


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Held-out pictures and questions.jsonl.")],
    model: Annotated[Path, typer.Option(help="Checkpoint.")] = ONEVISION,
    pictures: Annotated[int | None, typer.Option(help="Only the first so many.")] = None,
    tokens: Annotated[str, typer.Option(help="Comma between them.")] = ",".join(map(str, BUDGETS)),
    newlines: Annotated[str, typer.Option(help="rows or none, after reduction.")] = "rows",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure exact match of every reducer with a shared budget and with one for each square."""
    torch.set_num_threads(threads)
    if newlines not in ("rows", "none"):
        raise typer.BadParameter(f"--newlines {newlines}: expected rows or none.")
    language = LlavaOnevisionForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    language.set_attn_implementation("plain")
    examination = Examination(model, data, pictures, language.eval())
    bench = Bench(open_checkpoint(str(model)), "none" if newlines == "none" else "rows")
    rows = list_rows([int(word) for word in tokens.split(",")])
    report = report_from(bench.measure(rows, examination), examination)
    report |= {"model": model.resolve().name, "newlines": newlines}
    print(json.dumps(report) if as_json else tables_from(report))


def list_rows(budgets: Sequence[int]) -> list[Row]:
    """Return all tokens first, then the rows of each budget."""
    rows = [Row("none", 0, shared=False)]
    for budget in budgets:
        for name in REDUCERS:
            rows += [Row(name, budget, shared=True)] if _weighs(name) else []
            rows.append(Row(name, budget, shared=False))
    return rows


def _weighs(name: str) -> bool:
    return KINDS[REDUCERS[name][0]].weighs


class Bench:
    """A checkpoint's tower, projector and layout.

    Args:
        checkpoint: opened; its pictures are cut into tiles.
        newlines: after reduction.

    Raises:
        OptionError: a picture of the checkpoint is one square.
    """

    def __init__(self, checkpoint: Checkpoint, newlines: Newlines) -> None:
        tiles = tiles_of(checkpoint, newlines)
        if tiles is None:
            raise OptionError(f"{checkpoint.name} does not cut pictures into tiles.")
        self._module: VisionModule = build_vision_module(
            checkpoint, make_reducer("top_attention", budget=1)
        )
        side, newline = checkpoint.patch_side, checkpoint.image_newline().numpy()
        plain = LlavaNext(checkpoint.preprocessing, tiles, side, side, newline)
        self._all = replace(plain, all_tokens=True)
        self._reduced = plain if newlines == "rows" else replace(plain, newline=None)

    @torch.no_grad()
    def measure(self, rows: Sequence[Row], examination: Examination) -> dict[Row, Measured]:
        """Answer all questions about all pictures with the tokens that each row leaves."""
        found: dict[Row, list[Measured]] = defaultdict(list)
        starts = range(0, len(examination.pictures), _PICTURES_AT_ONCE)
        for start in track(list(starts), "pictures", console=Console(stderr=True)):
            files = examination.pictures[start : start + _PICTURES_AT_ONCE]
            shown = [load_picture(file) for file in files]
            sizes = [(one.shape[0], one.shape[1]) for one in shown]
            pixels = torch.from_numpy(self._all.pixel_values(shown, ALONE))  # [S, 3, H, W]
            for row, seen in self._leave(rows, self._module.tower(pixels), sizes):
                right = examination.right_answers(seen.tokens, seen.valid, first=start)
                patches = self._module.patches
                of_view = ((seen.origin >= 0) & (seen.origin < patches)).sum(axis=1)
                found[row].append(Measured(seen.valid, of_view, right))
        return {
            row: Measured(
                *(
                    np.concatenate([getattr(one, field.name) for one in parts])
                    for field in fields(Measured)
                )
            )
            for row, parts in found.items()
        }

    def _leave(
        self, rows: Sequence[Row], tower: TowerOutput, sizes: Sequence[Size]
    ) -> Iterator[tuple[Row, VisualTokens]]:
        """Yield the tokens of some pictures that each row leaves."""
        squares = [self._all.grid(size).squares for size in sizes]
        most = min(max(row.budget for row in rows), self._module.patches) or 1
        ranked: dict[str, VisualTokens] = {}
        for row in rows:
            if row.reducer == "none":
                yield row, self._all.assemble(self._seen(make_reducer("none"), tower), sizes)
                continue
            kind, options = REDUCERS[row.reducer]
            layout, shares = self._reduced, equal_shares(row.budget, squares)
            if not _weighs(row.reducer):
                yield row, layout.assemble(self._each(kind, options, tower, shares), sizes)
                continue
            if row.reducer not in ranked:
                # The first tokens of one ranking are what every smaller budget leaves.
                reducer = make_reducer(kind, budget=most, **options)
                ranked[row.reducer] = self._seen(reducer, tower)
            seen = ranked[row.reducer]
            if row.shared:
                tiles = layout.tiles.model_copy(update={"picture_tokens": row.budget})
                yield row, replace(layout, tiles=tiles).assemble(seen, sizes)
            elif seen.order is not None:
                kept = (seen.order >= 0) & (seen.order < shares[:, None])
                yield row, layout.assemble(seen.only(kept, int(shares.max())), sizes)

    def _seen(self, reducer: Reducer, tower: TowerOutput) -> VisualTokens:
        """Reduce squares and project their tokens."""
        if reducer.scoring is Scoring.NONE:
            tower = without_scores(tower.features, tower.class_token)
        left = reducer(tower)
        return VisualTokens(
            tokens=self._module.projector(left.tokens).numpy(),
            valid=left.valid.numpy(),
            origin=left.origin.numpy(),
            assignment=left.assignment.numpy(),
            milliseconds={},
            order=None if left.order is None else left.order.numpy(),
            worth=None if left.worth is None else left.worth.numpy(),
        )

    def _each(
        self, kind: str, options: dict[str, Any], tower: TowerOutput, shares: NDArray[np.int64]
    ) -> VisualTokens:
        """Reduce each square to its share, with a reducer for each number of tokens."""
        most, squares = int(shares.max()), len(shares)
        whole = VisualTokens(
            tokens=np.zeros((squares, most, self._reduced_width), np.float32),
            valid=np.zeros(squares, np.int64),
            origin=np.full((squares, most), -1),
            assignment=np.full((squares, self._module.patches), -1),
            milliseconds={},
        )
        for count in np.unique(shares).tolist():
            at = np.flatnonzero(shares == count)
            reducer = reducer_for_budget(kind, count, self._module.patches, **options)
            seen = self._seen(reducer, _rows_of(tower, torch.from_numpy(at)))
            whole.tokens[at, :count], whole.valid[at] = seen.tokens, seen.valid
            whole.origin[at, :count], whole.assignment[at] = seen.origin, seen.assignment
        return whole

    @property
    def _reduced_width(self) -> int:
        newline = self._all.newline
        return 0 if newline is None else len(newline)


def equal_shares(budget: int, squares: Sequence[int]) -> NDArray[np.int64]:
    """Return how many tokens each square of some pictures has of a picture's budget.

    Args:
        budget: of a picture.
        squares: how many squares each picture has.

    Raises:
        OptionError: a square would have none, which no reducer leaves.
    """
    if budget < max(squares):
        raise OptionError(f"{budget} tokens cannot be shared evenly by {max(squares)} squares.")
    shares = [budget // count + (np.arange(count) < budget % count) for count in squares]
    return np.concatenate(shares)


def _rows_of(tower: TowerOutput, rows: torch.Tensor) -> TowerOutput:
    first = tower.class_token
    return TowerOutput(
        tower.features[rows],
        tower.scores[rows],
        tower.keys[rows],
        None if first is None else first[rows],
    )


def report_from(measured: dict[Row, Measured], examination: Examination) -> dict[str, Any]:
    """Return shares of right answers, what is kept of all tokens', and what sharing changes.

    Intervals are of 95 %: Wilson's for a share, else bootstrapped over pictures.
    """
    about = examination.picture_of
    everything = next(one.right for row, one in measured.items() if row.reducer == "none")
    rows, gains = [], []
    for row, one in measured.items():
        right = one.right
        interval = wilson_interval(int(right.sum()), len(right))
        cell: dict[str, Any] = {
            **{"reducer": row.reducer, "budget": row.budget or None, "shared": row.shared},
            "tokens_used": round(float(one.used.mean()), 2),
            "of_whole_view": round(float(one.of_view.mean()), 2),
            "exact": round(float(right.mean()), 4),
            "interval": [round(end, 4) for end in interval],
            "types": {
                str(kind): round(float(right[examination.types == kind].mean()), 4)
                for kind in np.unique(examination.types)
            },
        }
        if everything.any():
            cell["kept"] = round(float(right.mean() / everything.mean()), 4)
            cell["kept_interval"] = paired_interval(right, everything, about, ratio=True)
        rows.append(cell)
        if row.shared:
            own = measured[replace(row, shared=False)].right
            gains.append(
                {
                    "reducer": row.reducer,
                    "budget": row.budget,
                    "difference": round(float(right.mean() - own.mean()), 4),
                    "interval": paired_interval(right, own, about),
                }
            )
    return {
        "pictures": len(examination.pictures),
        "questions": len(everything),
        "rows": rows,
        "shared_minus_square": gains,
    }


def tables_from(report: dict[str, Any]) -> str:
    """Return a report as two Markdown tables."""
    head = ["budget", "reducer", "budget of", "tokens used", "of the whole view"]
    lines = [[*head, "exact match (95 %)", "kept of all (95 %)"], ["---"] * 7]
    for row in report["rows"]:
        lines.append(
            [
                "all" if row["budget"] is None else str(row["budget"]),
                row["reducer"],
                "" if row["budget"] is None else "the picture" if row["shared"] else "a square",
                f"{row['tokens_used']:.1f}",
                f"{row['of_whole_view']:.1f}",
                f"{row['exact']:.1%} {_told(row['interval'])}",
                f"{row['kept']:.1%} {_told(row['kept_interval'])}" if "kept" in row else "",
            ]
        )
    lines += [[], ["budget", "reducer", "shared minus a budget for each square"], ["---"] * 3]
    lines += [
        [str(one["budget"]), one["reducer"], f"{one['difference']:+.1%} {_told(one['interval'])}"]
        for one in report["shared_minus_square"]
    ]
    asked = (
        f"{report['questions']:,} questions about {report['pictures']:,} pictures, "
        f"{report['model']}, newlines {report['newlines']}, float32."
    )
    table = ("| " + " | ".join(line) + " |" if line else "" for line in lines)
    return asked + "\n\n" + "\n".join(table)


def _told(interval: Sequence[float]) -> str:
    low, high = (100 * end for end in interval)
    return f"({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    app()
