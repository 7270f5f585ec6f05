"""Build a bundle from a checkpoint: `python -m export.build`.

With `--dry-run` it prints what would be built.
"""

from __future__ import annotations

from typing import Annotated

import typer

from calibration.int8.report import (
    document_from_int8,
    lines_from_frames,
    lines_from_int8,
    print_searches,
    tell_interruption,
    tell_missed_gate,
)
from engines import cli
from engines.errors import GateError
from engines.progress_bar import show_progress
from engines.termination import end_in_order
from export.build.plan import BuildOptions, BuildPlan, plan_build
from export.build.steps import BuildReport, build_bundle

EXAMPLES = (
    "`python -m export.build --model models/pocket-llava --out build/pocket`",
    "`python -m export.build --model llava-hf/llava-1.5-7b-hf --tokens 64,192 --out build/llava`",
    "`python -m export.build --model DIR --precision int8 --frames drive.mp4 --out build/int8`",
    "`python -m export.build --model DIR --input uint8 --frame 1080x1920 --out build/camera`",
    "`python -m export.build --model llava-hf/llava-v1.6-mistral-7b-hf --reducer scope "
    "--picture-tokens 160 --out build/next`",
    "`python -m export.build --model DIR --reducer prumerge_plus --tokens 144 --dry-run --out B`",
)


def main(
    *,
    options: BuildOptions,
    dry_run: Annotated[bool, typer.Option(help="Check everything, write nothing.")] = False,
    as_json: cli.JsonOption = False,
) -> int:
    """Build a bundle: one vision graph (tower, reducer, projector) and a quantized decoder.

    The bundle is written whole or not at all. The checkpoint is read tensor by tensor; how much
    memory, disk and time the build will take is told first (--dry-run), and what cannot fit is
    refused. A build that was stopped goes on where it was, by the same command.

    `--precision int8` calibrates on your own frames (--frames): 128 distinct ones or more, by day
    and night if the robot works by day and night. Three of eight are held out: INT8 must keep the
    patches that FP32 keeps on one (--gate), or nothing is written and the exit code is 1.
    """
    if dry_run:
        _tell_plan(plan_build(options), options, as_json)
        return 0
    try:
        with end_in_order(), show_progress() as progress:
            report = build_bundle(options, progress)
    except GateError as error:
        return tell_missed_gate(error, as_json)
    except KeyboardInterrupt:
        tell_interruption(options.out)
        raise
    _tell_report(report, as_json)
    return 0


def _tell_plan(plan: BuildPlan, options: BuildOptions, as_json: bool) -> None:
    graphs = [
        {"reducer": one.name, "tokens": one.token_count(plan.patches), **one.options}
        for one in plan.reducers
    ]
    if as_json:
        cli.print_json(
            {
                "model": plan.checkpoint.name,
                "target": plan.target.name,
                "precision": plan.precision,
                "decoders": {
                    name: options.decoders.precision_of(name) for name in options.decoders.backends
                },
                "patches": plan.patches,
                "tiles": None if plan.tiles is None else plan.tiles.model_dump(mode="json"),
                "input": _told_input(options),
                "vision": graphs,
                "bundle": str(options.out),
                "needs": {
                    "memory_bytes": plan.cost.memory_bytes,
                    "disk_bytes": plan.cost.disk_bytes,
                    "bundle_bytes": plan.cost.bundle_bytes,
                    "seconds": round(plan.cost.seconds),
                },
            }
        )
        return
    tiled = plan.tiles is not None
    print(f"{plan.checkpoint.name} for {plan.target.title}, nothing written (--dry-run):")
    for graph in graphs:
        chosen = ", ".join(f"{k} {v}" for k, v in graph.items() if k not in ("reducer", "tokens"))
        detail = f" ({chosen})" if chosen else ""
        print(
            f"  vision graph  {plan.precision}, {graph['reducer']}{detail}: "
            f"{graph['tokens']} of {plan.patches} visual tokens{' of each square' * tiled}"
        )
    if plan.tiles is not None:
        print(f"  a picture     {_told_tiles(plan)}")
    print(f"  takes         {_told_input(options)}")
    for backend in options.decoders.backends:
        print(f"  decoder       {options.decoders.precision_of(backend)}, {backend}")
    print(f"  into          {options.out}")
    print(f"  needs         {plan.cost.describe()}")


def _told_tiles(plan: BuildPlan) -> str:
    """Say how many squares and visual tokens a picture becomes."""
    tiles, side = plan.tiles, plan.checkpoint.patch_side
    if tiles is None:
        return "one square"
    most = max(
        tiles.most_tokens(one.token_count(plan.patches), side, one.name) for one in plan.reducers
    )
    shared = "" if tiles.picture_tokens is None else f"{tiles.picture_tokens} shared by content, "
    return (
        f"a view of it all and up to {tiles.most_squares - 1} tiles, {shared}at most {most} visual "
        "tokens with newlines"
    )


def _told_input(options: BuildOptions) -> str:
    return "float pixels" if options.frame is None else f"uint8 frames of {options.frame}"


def _tell_report(report: BuildReport, as_json: bool) -> None:
    if as_json:
        document = {
            "bundle": str(report.bundle),
            "bytes": report.bytes,
            "seconds": report.seconds,
            "total_seconds": report.total_seconds,
            "notes": report.notes,
        }
        if report.int8 is not None:
            document["int8"] = document_from_int8(report.int8, report.frames)
        cli.print_json(document)
        return
    for name, size in report.bytes.items():
        print(f"  {size / 1e6:10.2f} MB  {name}")
    total = sum(report.bytes.values()) / 1e6
    print(f"  {total:10.2f} MB  {report.bundle} in {report.total_seconds:.0f} s")
    if report.int8 is not None:
        print_searches(report.int8)
        print("\n".join(lines_from_frames(report.frames) + lines_from_int8(report.int8)))
    for note in report.notes:
        print(f"Note: {note}")
    print(f'\nNext: python -m runtime.ask {report.bundle} PICTURE "What is in the picture?"')
