"""Put the reports of several training seeds side by side, for the card.

    python models/pocket-llava/evaluate.py --checkpoint RUN --data DIR --json accuracy-seed-1.json
    python models/pocket-llava/seeds.py

The reports that lie beside this file enter, `accuracy.json` as that of the weights that are here; a
Markdown table leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHIPPED = 2
"""The seed of the weights that lie beside this file."""
Report = dict[str, Any]


def read_reports(folder: Path = HERE) -> dict[int, Report]:
    """Return the report of each seed that was measured."""
    files = {SHIPPED: folder / "accuracy.json"}
    for file in folder.glob("accuracy-seed-*.json"):
        files[int(file.stem.rpartition("-")[2])] = file
    return {seed: json.loads(files[seed].read_text("utf-8")) for seed in sorted(files)}


def _exact(report: Report) -> str:
    return f"{report['exact']:.1%} ({_interval(report['interval'])})"


def _interval(bounds: list[float]) -> str:
    low, high = (100 * bound for bound in bounds)
    return f"{low:.1f} to {high:.1f}"


def _weakest(report: Report) -> str:
    """Name the type that is nearest to the better of its two baselines."""
    over = {
        name: row["exact"] - max(row["majority"], row["wrong_image"])
        for name, row in report["types"].items()
    }
    name = min(over, key=lambda name: over[name])
    return f"{100 * over[name]:.1f} points ({name})"


def _at(tokens: int, name: str) -> Callable[[Report], str]:
    def cell(report: Report) -> str:
        value = report["reducers"][str(tokens)][name]
        return _exact(value) if isinstance(value, dict) else _interval([*value])

    return cell


ROWS: dict[str, Callable[[Report], str]] = {
    "all 576 tokens": lambda report: _exact(report["all"]),
    "weakest type over its baselines": _weakest,
}
for _tokens in (64, 32):
    ROWS |= {
        f"{_tokens}: VisionZip": _at(_tokens, "visionzip"),
        f"{_tokens}: VisionZip keeps of all, %": _at(_tokens, "visionzip_kept"),
        f"{_tokens}: over uniform, points": _at(_tokens, "visionzip_over_uniform"),
        f"{_tokens}: over random, points": _at(_tokens, "visionzip_over_random"),
    }


def table_of(reports: dict[int, Report]) -> str:
    """Return the reports as a Markdown table, a column for each seed."""
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in reports) + " |"]
    lines.append("|---" * (len(reports) + 1) + "|")
    for name, cell in ROWS.items():
        lines.append(f"| {name} | " + " | ".join(map(cell, reports.values())) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table_of(read_reports()))
