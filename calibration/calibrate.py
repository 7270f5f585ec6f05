"""Make an INT8 or FP8 bundle from an FP32 one on own frames: `python -m calibration.calibrate`.

When it misses the gate, nothing is written and the exit code is 1. PyTorch is not needed, so the
command runs on the robot.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

try:
    from calibration.int8.bundle import calibrate_bundle
    from calibration.int8.options import Int8Options, int8_precision
    from calibration.int8.report import (
        document_from_int8,
        lines_from_frames,
        lines_from_int8,
        print_searches,
        tell_interruption,
        tell_missed_gate,
    )
except ModuleNotFoundError as absent:
    if absent.name not in ("onnx", "onnx_ir"):
        raise
    print(
        f"error: calibrating needs {absent.name}, which a robot that only watches does not. Run: "
        "pip install 'foveate[calibration]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from absent
from engines import cli
from engines.bundle import open_bundle
from engines.errors import GateError
from engines.progress_bar import show_progress

EXAMPLES = (
    "`python -m calibration.calibrate build/pocket --frames drive.mp4 --out build/pocket-int8`",
    "`python -m calibration.calibrate B --frames log.mcap --topic /front --out B-int8`",
    "`python -m calibration.calibrate B --frames pictures/ --precision mixed --out B-mixed`",
    "`python -m calibration.calibrate B --calibration B-int8/vision/calibration.json --out B2`",
)


def main(
    bundle: Annotated[Path, typer.Argument(help="An FP32 bundle that `export.build` wrote.")],
    out: Annotated[Path, typer.Option(help="Directory of the INT8 or FP8 bundle.")],
    options: Int8Options,
    precision: Annotated[
        str,
        typer.Option(
            help="int8: every layer of the tower that gains by it. mixed: all but the layers that "
            "cost most, until the gate holds (it tries many, so it takes longer). fp8: every layer "
            "and attention in float8, for GPUs from Ada and Hopper on."
        ),
    ] = "int8",
    targets: Annotated[Path | None, typer.Option(help="TOML file of your own targets.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the bundle at --out.")] = False,
    verify: cli.VerifyOption = True,
    as_json: cli.JsonOption = False,
) -> int:
    """Make an INT8 or FP8 bundle from an FP32 one, calibrated on your own frames.

    Frames are taken evenly from the whole source, without repeats. Give 128 distinct ones or more,
    by day and night if the robot works by day and night; the command reports what they lack. Of
    eight frames five are calibrated on. On another INT8 must keep the patches that FP32 keeps and
    give nearly the same tokens (--gate), or nothing is written and the exit code is 1; one is for
    the search of mixed, and on the last nothing is decided: the report is made on those. After
    Ctrl-C the same command continues where it was.
    """
    opened = open_bundle(bundle, verify=verify)
    try:
        with show_progress() as progress:
            result = calibrate_bundle(
                opened,
                out,
                options,
                precision=int8_precision(precision),
                overwrite=overwrite,
                targets_file=targets,
                progress=progress,
            )
    except GateError as error:
        return tell_missed_gate(error, as_json)
    except KeyboardInterrupt:
        tell_interruption(out)
        raise
    if as_json:
        cli.print_json(
            {"bundle": str(out), "passed": True, **document_from_int8(result.made, result.frames)}
        )
        return 0
    print_searches(result.made)
    print("\n".join(lines_from_frames(result.frames) + lines_from_int8(result.made)))
    print(f'\nNext: python -m runtime.ask {out} PICTURE "What is in the picture?"')
    return 0


if __name__ == "__main__":
    cli.run(main, EXAMPLES)
