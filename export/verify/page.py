"""Write a verification as one HTML page without other files.

It holds tables, a chart of the error by stage, and overlays of the worst pictures as data URIs. It
has no scripts, and everything from outside (file names, answers) is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from math import isfinite, isnan, log10
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from calibration.agreement.stages import SELECTION
from engines import __version__
from engines.errors import OptionError
from engines.staging import staged_file
from export.verify.candidates import Candidate
from export.verify.report import CandidateReport, PictureAgreement, VerifyReport, rank_worst
from runtime.vision import Pixels, VisualTokens
from runtime.vision.overlay import draw_overlay
from runtime.vision.pictures import load_picture

_COLOURS = ("#1f6feb", "#d4581f", "#2d8a4e", "#8a3ffc", "#b8860b", "#c2255c")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 860, 260, 56, 66  # of the chart, in its own units
_JPEG_QUALITY = 82


@dataclass(frozen=True)
class _Seen:
    """What was made of one picture, enough to draw it."""

    file: Path
    candidate: Candidate
    theirs: VisualTokens
    ours: VisualTokens


class PageMaker:
    """Keeps what was compared (see `Watch`) and writes the page.

    Args:
        goal: the file to write.
        worst: how many pictures to draw.

    Raises:
        OptionError: not an .html file.
    """

    def __init__(self, goal: Path, worst: int) -> None:
        if goal.suffix.lower() not in (".html", ".htm"):
            raise OptionError(f"The page {goal} is not an .html file. Name it {goal.stem}.html.")
        self.goal = goal
        self.worst = worst
        self._seen: dict[tuple[str, str], _Seen] = {}

    def __call__(
        self, file: Path, candidate: Candidate, theirs: VisualTokens, ours: VisualTokens
    ) -> None:
        """Remember one picture, without the tokens' values."""
        seen = _Seen(file, candidate, _without_values(theirs), _without_values(ours))
        self._seen[(file.name, candidate.name)] = seen

    def write(self, report: VerifyReport) -> None:
        """Write the page completely or not at all.

        Raises:
            OptionError: it cannot be written.
        """
        names = rank_worst(report.candidates, self.worst)
        html = _render(report, [self._frame(report, name) for name in names])
        with staged_file(self.goal, OptionError) as staged:
            staged.write_text(html, "utf-8")

    def _frame(self, report: VerifyReport, name: str) -> dict[str, Any]:
        """Return one picture for the template: PyTorch's overlay and that of every candidate."""
        seen = [self._seen[(name, one.name)] for one in report.candidates]
        picture = load_picture(seen[0].file)
        expected: dict[bytes, dict[str, str]] = {}
        views, alike = [], []
        for number, (one, report_of) in enumerate(zip(seen, report.candidates, strict=True)):
            row = next(row for row in report_of.pictures if row.file == name)
            fates = _fates(one.theirs)
            if fates not in expected:
                expected[fates] = {
                    "title": f"PyTorch, {report_of.reducer['name']} {report_of.reducer['tokens']}",
                    "image": _data_uri(draw_overlay(picture, one.theirs, one.candidate.bundle)),
                    "answer": row.answer.reference if row.answer is not None else "",
                }
            view = {
                "title": one.candidate.name,
                "colour": _COLOURS[number % len(_COLOURS)],
                "row": row,
                "flips": _flips(row, one.candidate.graph.patch_columns),
            }
            if _fates(one.ours) == fates:
                alike.append(view)
            else:
                flips = row.visual_tokens.only_reference + row.visual_tokens.only_candidate
                drawn = draw_overlay(picture, one.ours, one.candidate.bundle, marked=flips)
                views.append({**view, "image": _data_uri(drawn)})
        return {"file": name, "expected": list(expected.values()), "views": views, "alike": alike}


def _render(report: VerifyReport, frames: Sequence[dict[str, Any]]) -> str:
    template = files("export.verify").joinpath("page.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"share": _share, "short": _short, "fixed": _fixed}
    return environment.from_string(template).render(
        report=report,
        version=__version__,
        colours=[_COLOURS[at % len(_COLOURS)] for at in range(len(report.candidates))],
        stages=_stage_rows(report.candidates),
        chart=_chart(report.candidates),
        frames=frames,
        pictures=list(zip(*(one.pictures for one in report.candidates), strict=True)),
    )


def _fates(seen: VisualTokens) -> bytes:
    """Return what became of the patches, as a key."""
    return seen.origin.tobytes() + seen.assignment.tobytes()


def _without_values(seen: VisualTokens) -> VisualTokens:
    return replace(seen, tokens=np.empty((*seen.tokens.shape[:2], 0), np.float32))


def _data_uri(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _flips(row: PictureAgreement, columns: int) -> list[str]:
    """Say which patches only one side keeps, by row and column from 1."""
    seen = row.visual_tokens
    told = []
    for who, patches in (("PyTorch", seen.only_reference), ("the bundle", seen.only_candidate)):
        if patches:
            places = ", ".join(f"{at // columns + 1}/{at % columns + 1}" for at in patches)
            told.append(f"kept by {who} alone (row/column): {places}")
    return told


def _stage_rows(candidates: Sequence[CandidateReport]) -> list[dict[str, Any]]:
    """Return the stages in order, each with what every candidate showed there."""
    longest = max((one.stages for one in candidates), key=len)
    names = dict.fromkeys(stage.stage for stage in longest)
    names |= dict.fromkeys(stage.stage for one in candidates for stage in one.stages)
    by_name = [{stage.stage: stage for stage in one.stages} for one in candidates]
    return [{"stage": name, "cells": [stages.get(name) for stages in by_name]} for name in names]


def _chart(candidates: Sequence[CandidateReport]) -> dict[str, Any]:
    """Lay out the worst error by stage, logarithmic; what is zero or no number has no point.

    The selection has none either: its error is of another kind.
    """
    rows = [row for row in _stage_rows(candidates) if row["stage"] != SELECTION]
    values = [cell.worst for row in rows for cell in row["cells"] if cell is not None]
    drawn = [log10(value) for value in values if isfinite(value) and value > 0]
    low, high = (int(min(drawn) // 1), int(max(drawn) // 1) + 1) if drawn else (-6, 0)
    step = (_WIDTH - _LEFT) / max(1, len(rows))

    def height(exponent: float) -> float:
        return round(8 + (high - exponent) / (high - low) * (_HEIGHT - _BOTTOM - 8), 1)

    lines = []
    for number in range(len(candidates)):
        points = []
        for at, row in enumerate(rows):
            cell = row["cells"][number]
            if cell is not None and isfinite(cell.worst) and cell.worst > 0:
                x = round(_LEFT + (at + 0.5) * step, 1)
                points.append({"x": x, "y": height(log10(cell.worst)), "diverged": cell.diverged})
        lines.append({"points": points, "colour": _COLOURS[number % len(_COLOURS)]})
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "floor": _HEIGHT - _BOTTOM,
        "ticks": [{"y": height(at), "label": f"1e{at}"} for at in range(low, high + 1)],
        "names": [
            {"x": round(_LEFT + (at + 0.5) * step, 1), "label": row["stage"]}
            for at, row in enumerate(rows)
        ],
        "lines": lines,
    }


def _share(value: float) -> str:
    return f"{value:.1%}" if isfinite(value) else "NaN"


def _short(value: float) -> str:
    if not isfinite(value):
        return "NaN" if isnan(value) else "inf"
    return f"{value:.1e}" if value else "0"


def _fixed(value: float) -> str:
    return f"{value:.5f}" if isfinite(value) else "NaN"
