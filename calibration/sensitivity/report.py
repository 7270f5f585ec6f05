"""Show a sensitivity search as a terminal table, an SVG chart, or rows for JSON."""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from calibration.sensitivity.ranking import SiteCost
from calibration.sensitivity.search import SensitivityReport

_ROW, _LEFT, _BAR, _RIGHT, _TOP = 18, 270, 360, 110, 56
_INT8, _FLOAT = "#0b6e99", "#d9480f"


def table_from_report(report: SensitivityReport) -> Table:
    """Return one row per site, the costliest for its weights first."""
    gate = report.gate
    table = Table(
        box=SIMPLE,
        title=f"INT8, one activation at a time (gate: overlap {gate.overlap:g}, "
        f"cosine {gate.cosine:g})",
        caption=_summary(report),
    )
    table.add_column("site")
    for name in ("weights", "overlap", "cosine", "cost"):
        table.add_column(name, justify="right")
    table.add_column("runs in")
    for site in report.sites:
        excluded = _is_excluded(report, site)
        table.add_row(
            site.site,
            f"{site.weights:,}",
            f"{site.alone.overlap:.4f}",
            f"{site.alone.cosine:.5f}",
            f"{site.cost:.2f}",
            "float" if excluded else "INT8",
            style="bold" if excluded else None,
        )
    return table


def json_from_report(report: SensitivityReport) -> dict[str, Any]:
    """Return a search as plain values for JSON."""
    return {
        "gate": asdict(report.gate),
        "before": asdict(report.before),
        "after": asdict(report.after),
        "excluded": list(report.calibration.excluded),
        "sites": [
            {
                "site": site.site,
                "layers": list(site.layers),
                "weights": site.weights,
                **asdict(site.alone),
                "cost": site.cost,
                "excluded": _is_excluded(report, site),
            }
            for site in report.sites
        ],
    }


def svg_from_report(report: SensitivityReport) -> str:
    """Return a bar for what each site costs, in multiples of what the gate allows."""
    height = _TOP + _ROW * len(report.sites) + 12
    width = _LEFT + _BAR + _RIGHT
    most = max((site.cost for site in report.sites), default=0.0) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<text x="12" y="20" font-size="14">What INT8 costs, one activation at a time</text>',
        f'<text x="12" y="40" fill="#495057">{escape(_summary(report))}</text>',
    ]
    for number, site in enumerate(report.sites):
        middle = _TOP + _ROW * number + _ROW / 2
        excluded = _is_excluded(report, site)
        length = _BAR * site.cost / most
        parts += [
            f'<text x="{_LEFT - 8}" y="{middle + 4:g}" text-anchor="end">'
            f"{escape(site.site)}</text>",
            f'<rect x="{_LEFT}" y="{middle - 6:g}" width="{length:.1f}" height="12" '
            f'fill="{_FLOAT if excluded else _INT8}"/>',
            f'<text x="{_LEFT + length + 6:.1f}" y="{middle + 4:g}" fill="#495057">{site.cost:.2f}'
            f"{' float' if excluded else ''}</text>",
        ]
    return "\n".join([*parts, "</svg>", ""])


def _is_excluded(report: SensitivityReport, site: SiteCost) -> bool:
    return set(site.layers) <= set(report.calibration.excluded)


def _summary(report: SensitivityReport) -> str:
    before, after, made = report.before, report.after, report.calibration
    if not report.sites:
        return f"The gate holds as it is: overlap {before.overlap:.4f}, cosine {before.cosine:.5f}."
    return (
        f"All in INT8: overlap {before.overlap:.4f}, cosine {before.cosine:.5f}. With "
        f"{len(made.excluded)} of {len(made.layers)} layers in floating point: "
        f"{after.overlap:.4f}, {after.cosine:.5f}."
    )
