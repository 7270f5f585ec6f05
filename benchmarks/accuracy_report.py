"""What `benchmarks.accuracy` measured, as tables, a chart and figures for machines.

Enters: results, one a cell of reducer, budget and precision, and the questions they are about.
Leaves: Markdown between markers of a page, an SVG beside it, a JSON document. Shares have Wilson's
95 % intervals; differences are of the same questions, bootstrapped over pictures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.packed_answers import Examination
from engines.staging import staged_file
from export.line_chart import Axes, Line, line_chart

from evaluate import paired_interval, wilson_interval  # isort: skip - found by packed_answers

CHART_FILE = "accuracy.svg"
MARK = "benchmarks.accuracy"
GOAL_POINTS = 1.0
"""How many points another precision may lose against float32."""


@dataclass(frozen=True)
class Result:
    """One cell.

    Attributes:
        reducer: its name.
        tokens: the budget.
        precision: of the vision graph.
        mean_tokens: real visual tokens of a picture, on average.
        right: bool[Q]; which questions were answered exactly.
        graph_sha256: of the graph that ran.
        seconds: that encoding and answering took.
    """

    reducer: str
    tokens: int
    precision: str
    mean_tokens: float
    right: NDArray[np.bool_]
    graph_sha256: str
    seconds: float

    @property
    def exact(self) -> float:
        """Share of questions answered exactly."""
        return float(self.right.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of that share."""
        low, high = wilson_interval(int(self.right.sum()), len(self.right))
        return low, high

    def to_json(self) -> dict[str, Any]:
        """Return the cell as a line of the results file."""
        bits = np.packbits(self.right).tobytes().hex()
        return {**asdict(self), "right": bits, "questions": len(self.right)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Result:
        """Read a line of the results file."""
        bits = np.frombuffer(bytes.fromhex(fields["right"]), np.uint8)
        right = np.unpackbits(bits, count=fields.pop("questions")).astype(bool)
        return Result(**{**fields, "right": right})


@dataclass(frozen=True)
class Loss:
    """How many points one cell lies below another on the same questions.

    Attributes:
        points: positive where something was lost.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    points: float
    low: float
    high: float

    def __str__(self) -> str:
        points, low, high = (round(x, 1) + 0.0 for x in (self.points, self.low, self.high))
        return f"{points} ({low} to {high})"  # + 0.0: no -0.0


def measure_loss(reference: Result, candidate: Result, picture_of: NDArray[np.int64]) -> Loss:
    """Compare two cells question by question."""
    low, high = paired_interval(reference.right, candidate.right, picture_of)
    return Loss(100 * (reference.exact - candidate.exact), 100 * low, 100 * high)


def losses_to_precision(
    results: Sequence[Result], picture_of: NDArray[np.int64]
) -> dict[tuple[str, int, str], Loss]:
    """Return what each precision but float32 loses, by reducer, budget and precision."""
    full = {(one.reducer, one.tokens): one for one in results if one.precision == "fp32"}
    return {
        (one.reducer, one.tokens, one.precision): measure_loss(full[cell], one, picture_of)
        for one in results
        if (cell := (one.reducer, one.tokens)) in full and one.precision != "fp32"
    }


def summarize(results: Sequence[Result], examination: Examination) -> dict[str, Any]:
    """Return everything for machines, and whether the precisions keep their goal."""
    losses = losses_to_precision(results, examination.picture_of)
    worst = {
        precision: max(loss.points for key, loss in losses.items() if key[2] == precision)
        for precision in sorted({key[2] for key in losses})
    }
    return {
        "pictures": len(examination.pictures),
        "questions": len(examination.types),
        "cells": [
            {"reducer": r.reducer, "tokens": r.tokens, "precision": r.precision, **_figures(r)}
            for r in results
        ],
        "largest_loss_points": {name: round(points, 2) for name, points in worst.items()},
        "met": all(points <= GOAL_POINTS for points in worst.values()),
    }


def budgets_from_results(results: Sequence[Result], examination: Examination) -> str:
    """Return what each cell costs against all tokens in float32, as `AccuracyTable` reads it.

    Returns:
        A JSON document, reducer -> precision -> tokens -> figures, with a line for each cell.
    """
    everything = next(one for one in results if one.reducer == "none" and one.precision == "fp32")
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for one in results:
        loss = measure_loss(everything, one, examination.picture_of)
        cells.setdefault(one.reducer, {}).setdefault(one.precision, {})[str(one.tokens)] = {
            **_figures(one),
            "points_lost": round(loss.points, 2),
            "points_lost_interval": [round(loss.low, 2), round(loss.high, 2)],
        }
    document = {
        "schema": 1,
        "measured_by": "benchmarks.accuracy",
        "pictures": len(examination.pictures),
        "questions": len(examination.types),
        "reducers": cells,
    }
    indented = json.dumps(document, indent=1)
    return re.sub(r"{[^{}]*}", lambda cell: json.dumps(json.loads(cell[0])), indented) + "\n"


def _figures(result: Result) -> dict[str, Any]:
    return {
        "mean_tokens": round(result.mean_tokens, 1),
        "exact": round(result.exact, 4),
        "interval": [round(end, 4) for end in result.interval],
    }


def table_from_results(results: Sequence[Result], examination: Examination) -> str:
    """Return a Markdown table, a row for each reducer and budget."""
    losses = losses_to_precision(results, examination.picture_of)
    others = sorted({key[2] for key in losses})
    head = ["tokens", "reducer", "tokens used", "fp32", "95 %"]
    head += [cell for name in others for cell in (name, f"{name}: points lost (95 %)")]
    rows = [head, ["---:", "---", *["---:"] * (len(head) - 2)]]
    by_cell = {(one.reducer, one.tokens, one.precision): one for one in results}
    for one in results:
        if one.precision != "fp32":
            continue
        low, high = one.interval
        row = [str(one.tokens), one.reducer, f"{one.mean_tokens:.1f}", f"{one.exact:.1%}"]
        row.append(f"{low:.1%} to {high:.1%}")
        for name in others:
            key = (one.reducer, one.tokens, name)
            row += [f"{by_cell[key].exact:.1%}", str(losses[key])] if key in losses else ["", ""]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def chart_from_results(results: Sequence[Result]) -> str:
    """Draw exact match over the budget in float32; other precisions would lie on top of it."""
    full = sorted((one for one in results if one.precision == "fp32"), key=lambda one: one.tokens)
    names = dict.fromkeys(one.reducer for one in results if one.reducer != "none")
    lines = []
    for name in names:
        cells = [one for one in full if one.reducer in (name, "none")]
        points = [(float(one.tokens), 100 * one.exact) for one in cells]
        whiskers = [(100 * low, 100 * high) for low, high in (one.interval for one in cells)]
        lines.append(Line(name, points, whiskers))
    axes = Axes("visual tokens (budget)", "exact match, %", logarithmic=True)
    return line_chart("Right answers against visual tokens, float32", axes, lines)


def write_report(page: Path, results: Sequence[Result], examination: Examination) -> None:
    """Replace what stands between the markers of a page, and the chart beside it."""
    summary = summarize(results, examination)
    worst = ", ".join(f"{k} {v:.1f}" for k, v in summary["largest_loss_points"].items())
    body = (
        f"{summary['questions']:,} questions about {summary['pictures']} held-out pictures. "
        f"Largest loss of a precision against float32, in points: {worst}.\n\n"
        f"![Exact match over the token budget]({CHART_FILE})\n\n"
        f"{table_from_results(results, examination)}"
    )
    replace_between(page, MARK, body)
    with staged_file(page.with_name(CHART_FILE)) as staged:
        staged.write_text(chart_from_results(results), "utf-8")


def replace_between(page: Path, mark: str, body: str) -> None:
    """Replace what stands between the two comments of a mark on a page.

    Raises:
        ValueError: the page does not have both.
    """
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, found, rest = page.read_text("utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page} lacks {begin} or {end}")
    with staged_file(page) as staged:
        staged.write_text(f"{before}{begin}\n{body}\n{end}{after}", "utf-8")
