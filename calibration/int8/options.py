"""Options of an INT8 quantization: what it is made from and which gate it must pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

import typer

from calibration.agreement.token_metrics import Gate
from calibration.frames.dataset import FrameOptions
from calibration.scales.calibrate import CalibrationOptions
from calibration.scales.calibration_file import Calibration, load_calibration
from engines.errors import OptionError
from engines.manifest import Precision
from engines.option_groups import Typed
from runtime.frames import open_source

_ALL_LAYERS = Gate(overlap=0.9, cosine=0.99)
GATES: dict[Precision, Gate] = {"int8": _ALL_LAYERS, "mixed": Gate(), "fp8": _ALL_LAYERS}
"""Least agreement unless the user asks for another. Patches of a plain background have nearly equal
scores, and any rounding exchanges some: one exchanged of 53 is an overlap of 0.963. So INT8 in all
layers is asked for less, and the search of ``mixed`` gives back layers until it is better. The
floors, 0.5 for the worst picture and 0.63 for what is merged alike, are between sound and broken
INT8 of the bundled checkpoint; docs/calibration.md has the table."""

_PRECISIONS = tuple(GATES)


def _told(gate: Gate) -> str:
    return ",".join(f"{name}={limit:g}" for name, limit in asdict(gate).items())


def gate_from_text(text: str) -> Gate:
    """Read ``overlap=0.97,cosine=0.99``; what is left out keeps its default.

    Raises:
        OptionError: another name, or a number that is not 0 to 1.
    """
    limits = {}
    names = [one.name for one in fields(Gate)]
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            limit = float(number)
        except ValueError:
            limit = -1.0
        if name not in names or not 0 <= limit <= 1:
            raise OptionError(
                f"--gate {text}: {part.strip()!r} is not {' or '.join(names)} with a number from "
                "0 to 1. Give for example overlap=0.97,cosine=0.99."
            )
        limits[name] = limit
    return Gate(**limits)


@dataclass(frozen=True)
class Int8Options:
    """How a bundle becomes INT8.

    Attributes:
        frames: the source of the user's own frames; see `runtime.frames.opening.KINDS`.
        choice: which of them.
        record: a calibration to be used again instead of making one; frames are then only checked
            on.
        how: how to calibrate.
        gate: the least agreement with FP32 on frames that were held out; None takes `GATES`.
    """

    frames: Annotated[
        str | None,
        typer.Option(
            help="Your own frames: a folder of pictures, a video, a ROS bag or MCAP file, a "
            "camera, or whatever else `runtime.watch` watches."
        ),
    ] = None
    choice: FrameOptions = field(default_factory=FrameOptions)
    record: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="A calibration made before (vision/calibration.json of a bundle), to be used "
            "again; with --frames too, the result is checked on them.",
        ),
    ] = None
    how: CalibrationOptions = field(default_factory=CalibrationOptions)
    gate: Annotated[
        Gate | None,
        typer.Option(
            help="Least agreement with FP32 on frames that were held out: on average overlap of "
            "the kept patches (IoU), cosine of the tokens made of the same, and share of the other "
            "patches merged alike (merged); and overlap on the worst frame (worst). Left out, "
            f"{_told(GATES['int8'])} for int8 and fp8, {_told(GATES['mixed'])} for mixed."
        ),
        Typed(gate_from_text),
    ] = None

    def gate_for(self, precision: Precision) -> Gate:
        """Return the least agreement of a precision."""
        return self.gate if self.gate is not None else GATES[precision]

    def check(self, precision: Precision) -> Calibration | None:
        """Refuse what cannot work.

        Returns:
            The calibration that is to be used again, if one is.

        Raises:
            OptionError: nothing to calibrate with, or something to calibrate with for a precision
                that has no use for it.
            SourceError: the frames cannot be opened.
            CalibrationError: the record is damaged.
        """
        wanted = precision in _PRECISIONS
        if not wanted and (self.frames is not None or self.record is not None):
            raise OptionError(
                "--frames and --calibration are for INT8 and FP8, and the precision is "
                f"{precision}. Add --precision int8 (or mixed, or fp8), or leave them out."
            )
        if not wanted:
            return None
        if self.frames is None and self.record is None:
            raise OptionError(
                f"--precision {precision} is calibrated on your own frames: give a folder, a "
                "video, a bag or a camera with --frames SOURCE, or a calibration made before with "
                "--calibration FILE."
            )
        record = load_calibration(self.record) if self.record is not None else None
        if record is not None and record.excluded and precision == "int8":
            raise OptionError(
                f"{self.record} leaves {len(record.excluded)} layers in floating point, such as "
                f"{record.excluded[0]}. Use it with --precision mixed, or calibrate again."
            )
        self._check_source()
        return record

    def _check_source(self) -> None:
        """Open the source once, unless that would take frames from a pipe."""
        if self.frames is None or self.frames == "-" or self.frames.startswith("raw:"):
            return
        open_source(self.frames, self.choice.view).close()


def int8_precision(text: str) -> Precision:
    """Return ``int8``, ``mixed`` or ``fp8``.

    Raises:
        OptionError: it is none of them.
    """
    for known in _PRECISIONS:
        if known == text:
            return known
    raise OptionError(f"--precision {text}: expected {' or '.join(_PRECISIONS)}.")
