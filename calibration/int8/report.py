"""Report what a calibration did, as text lines or one JSON object."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibration.agreement.measured import FEWEST_PICTURES, Measure, MeasuredAgreement
from calibration.frames.coverage import document_from_coverage, lines_from_coverage
from calibration.frames.dataset import CalibrationSet
from calibration.int8.graphs import RECORD_NAME, Int8Graphs
from calibration.int8.resume import ResumeFolder
from calibration.sensitivity.report import json_from_report, table_from_report
from engines import cli
from engines.errors import GateError


def document_from_int8(made: Int8Graphs, frames: CalibrationSet | None) -> dict[str, Any]:
    """Return it as a JSON object."""
    calibration = made.calibration
    return {
        "record": RECORD_NAME,
        "method": calibration.method,
        "frames_sha256": made.set_digest,
        "coverage": document_from_coverage(frames.coverage) if frames is not None else None,
        "squares": len(frames) if frames is not None else None,
        "held_out": made.held_out,
        "agreement": {name: asdict(one) for name, one in made.agreements.items()},
        "report": {name: asdict(one) for name, one in made.reports.items()},
        "quantized_to": made.form.name,
        "quantized_attentions": made.attentions,
        "quantized_layers": len(calibration.quantized),
        "excluded_layers": list(calibration.excluded),
        "sensitivity": {name: json_from_report(search) for name, search in made.searches.items()},
    }


def lines_from_int8(made: Int8Graphs) -> list[str]:
    """Return it as lines, without the coverage of the frames."""
    calibration = made.calibration
    form, count = made.form.name.upper(), len(calibration.layers)
    lines = [f"  {form} in {len(calibration.quantized)} of {count} layers of the tower"]
    if made.form.attention:
        lines[0] += f", and in {made.attentions} of its {len(calibration.attentions)} attentions"
    if calibration.excluded:
        lines.append(f"  left in floating point: {', '.join(calibration.excluded)}")
    for name, one in made.reports.items():
        lines += [
            f"  {name} on {_told_frames(one)} that nothing was decided on "
            f"(mean, its 95 % interval, worst {'square' if _has_tiles(one) else 'frame'}):",
            f"    patches kept alike      {_told(one.overlap, '.1%')}",
            f"    others merged alike     {_told(one.assignment, '.1%')}",
            f"    cosine of equal tokens  {_told(one.cosine, '.5f')}",
        ]
    fewest = min((one.pictures for one in made.reports.values()), default=FEWEST_PICTURES)
    if fewest < FEWEST_PICTURES:
        lines.append(
            f"  warning: {fewest} frames say little of the worst one, expected {FEWEST_PICTURES} "
            f"or more: give {8 * FEWEST_PICTURES} frames, every eighth is reported on"
        )
    if not made.reports:
        lines.append("  not checked: there were no frames to check on (--frames)")
    return lines


def _has_tiles(one: MeasuredAgreement) -> bool:
    return one.squares not in (None, one.pictures)


def _told_frames(one: MeasuredAgreement) -> str:
    return f"{one.squares} squares of " * _has_tiles(one) + f"{one.pictures} frames"


def _told(measure: Measure, form: str) -> str:
    mean, low, high, worst = (
        format(value, form) for value in (measure.mean, measure.low, measure.high, measure.worst)
    )
    return f"{mean}, {low} to {high}, {worst}"


def print_searches(made: Int8Graphs) -> None:
    """Print what `--precision mixed` found, a table for each graph that needed a search."""
    from rich.console import Console

    for search in made.searches.values():
        if search.sites:
            Console().print(table_from_report(search))


def lines_from_frames(frames: CalibrationSet | None) -> list[str]:
    """Return what the frames cover."""
    if frames is None:
        return []
    lines = lines_from_coverage(frames.coverage)
    if len(frames) > len(frames.frames):
        each = max(frames.counts)
        lines.append(
            f"{len(frames)} squares of them: of each frame the view of all of it and "
            f"{'a tile' if each == 2 else f'up to {each - 1} tiles'}, by chance"
        )
    return lines


def tell_missed_gate(error: GateError, as_json: bool) -> int:
    """Say that INT8 was not good enough; returns the exit code."""
    if as_json:
        cli.print_json({"passed": False, "failure": str(error)})
    else:
        print(f"failed: {error}", file=sys.stderr)
    return 1


def tell_interruption(out: Path) -> None:
    """Say where an interrupted calibration goes on."""
    folder = ResumeFolder(out).folder
    if folder.exists():
        print(
            f"Interrupted. {folder} keeps what was measured: the same command goes on from there.",
            file=sys.stderr,
        )
