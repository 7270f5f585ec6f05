"""Options of an INT8 quantization: what it is made from and which gate it must pass."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, get_args

import typer

from calibration.agreement.token_metrics import Gate
from calibration.frames.dataset import FrameOptions
from calibration.scales.calibrate import CalibrationOptions
from calibration.scales.calibration_file import Calibration, load_calibration
from calibration.scales.ranges import Method
from engines import cli
from engines.errors import OptionError
from engines.manifest import Precision
from runtime.frames import SourceOptions, open_source
from runtime.frames.opening import crop_from_text

_METHODS = get_args(Method)

GATES: dict[Precision, Gate] = {"int8": Gate(overlap=0.9, cosine=0.99), "mixed": Gate()}
"""Least agreement unless the user asks for another. Patches of a plain background have nearly equal
scores, and any rounding exchanges some: one exchanged of 53 is an overlap of 0.963. So INT8 in all
layers is asked for less, and the search of ``mixed`` gives back layers until it is better."""

_PRECISIONS = tuple(GATES)


def _told(gate: Gate) -> str:
    return f"overlap={gate.overlap:g},cosine={gate.cosine:g}"


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

    frames: str | None = None
    choice: FrameOptions = field(default_factory=FrameOptions)
    record: Path | None = None
    how: CalibrationOptions = field(default_factory=CalibrationOptions)
    gate: Gate | None = None

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
                f"--frames and --calibration are for INT8, and the precision is {precision}. Add "
                "--precision int8 (or mixed), or leave them out."
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
        view = self.choice.view
        open_source(
            self.frames, rotate=view.rotate, crop=view.crop, fps=view.fps, topic=view.topic
        ).close()


@dataclass(frozen=True)
class Int8Flags:
    """What INT8 is calibrated on and which gate it must pass."""

    frames: Annotated[
        str | None,
        typer.Option(
            help="Your own frames: a folder of pictures, a video, a ROS bag or MCAP file, a "
            "camera, or whatever else `runtime.watch` watches."
        ),
    ] = None
    max_frames: Annotated[
        int,
        typer.Option(
            min=2, help="Most frames to take, spread evenly over the source, repeats left out."
        ),
    ] = 256
    rotate: Annotated[
        int, typer.Option(help="Degrees clockwise, as the robot will watch: 0, 90, 180 or 270.")
    ] = 0
    crop: Annotated[
        str | None, typer.Option(help="Part of the frame to look at: x,y,width,height in pixels.")
    ] = None
    fps: Annotated[
        float | None,
        typer.Option(help="Most frames per second to read; of a camera 1 if left out."),
    ] = None
    topic: Annotated[str | None, typer.Option(help="Topic of a bag, by name or message type.")] = (
        None
    )
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Of a camera: how long to collect at most.")
    ] = 600.0
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="A calibration made before (vision/calibration.json of a bundle), to be used "
            "again; with --frames too, the result is checked on them."
        ),
    ] = None
    method: Annotated[
        str,
        typer.Option(help=f"How an activation's range is chosen: {', '.join(_METHODS)}."),
    ] = CalibrationOptions.method
    gate: Annotated[
        str | None,
        typer.Option(
            help="Least agreement with FP32 on frames that were held out: overlap of the kept "
            "patches (IoU) and cosine of the tokens made of the same, on average. Left out, "
            f"{_told(GATES['int8'])} for int8, {_told(GATES['mixed'])} for mixed."
        ),
    ] = None

    def options(self, threads: int | None = None) -> Int8Options:
        """Return the options, checked together.

        Raises:
            OptionError: an option is not possible.
        """
        cli.one_of("--method", self.method, Method)
        view = SourceOptions(
            rotate=self.rotate,  # type: ignore[arg-type]  # checked there
            crop=crop_from_text(self.crop) if self.crop else None,
            fps=self.fps,
            topic=self.topic,
        )
        return Int8Options(
            frames=self.frames,
            choice=FrameOptions(self.max_frames, view, self.seconds),
            record=self.calibration,
            how=CalibrationOptions(method=self.method, threads=threads),  # type: ignore[arg-type]
            gate=gate_from_text(self.gate) if self.gate is not None else None,
        )


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


def int8_precision(text: str) -> Precision:
    """Return ``int8`` or ``mixed``.

    Raises:
        OptionError: it is neither.
    """
    for known in _PRECISIONS:
        if known == text:
            return known
    raise OptionError(f"--precision {text}: expected {' or '.join(_PRECISIONS)}.")
