"""The command `python -m export.verify`: its options and what it prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from engines import cli
from export.tracks import show_tracks
from export.verify.comparison import VerifyOptions, verify_bundles
from export.verify.golden_run import write_golden_run
from export.verify.page import PageMaker
from export.verify.report import json_from_report
from export.verify.tables import print_report

EXAMPLES = (
    "`python -m export.verify build/pocket --images pictures/`",
    "`python -m export.verify B32 B16 --model DIR --images pictures/ --html verify.html`",
    "`python -m export.verify B --images pictures/ --engine ort,openvino --vision-only --json`",
    "`python -m export.verify B --images pictures/ --max-images 8 --polygraphy golden/`",
)


def main(
    options: VerifyOptions,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with tables and overlays to this file.")
    ] = None,
    worst: Annotated[int, typer.Option(min=1, help="How many of the worst pictures to show.")] = 6,
    polygraphy: Annotated[
        Path | None,
        typer.Option(
            help="Instead of comparing, write what NVIDIA's `polygraphy run` needs to compare one "
            "bundle without Foveate: inputs, PyTorch's outputs, scripts and command lines."
        ),
    ] = None,
    as_json: cli.JsonOption = False,
) -> int:
    """Compare bundles with the checkpoint they were built from, on pictures of yours.

    PyTorch runs the checkpoint as transformers does, in float32, with every attention matrix; all
    sides get the same pixels. What is compared: which patches are kept, where the others are
    merged, the tokens both sides have, the first token's logits, the answer; and stage by stage,
    so that the report names the first layer that errs. Tolerances left out are those of a
    bundle's precision. Exit code 1: a measure is past its tolerance.
    """
    if polygraphy is not None:
        return _write_golden_run(options, polygraphy, as_json)
    page = PageMaker(html, worst) if html is not None else None
    return _compare(options, page, worst, as_json)


def _compare(options: VerifyOptions, page: PageMaker | None, worst: int, as_json: bool) -> int:
    report = verify_bundles(
        options,
        show_tracks(Console(stderr=True)),
        note=_note,
        watch=page,
    )
    if page is not None:
        page.write(report)
    if as_json:
        cli.print_json(json_from_report(report))
    else:
        print_report(report, worst)
        if page is not None:
            print(f"The page: {page.goal}")
    return 0 if report.passed else 1


def _write_golden_run(options: VerifyOptions, folder: Path, as_json: bool) -> int:
    written = write_golden_run(options, folder, _note)
    if as_json:
        cli.print_json({"folder": str(folder), "files": list(written)})
    else:
        print(f"{folder} holds {', '.join(written)}. Next: cd {folder} && ./run.sh onnxrt")
    return 0


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
