"""Find how a tower is to be quantized, on the user's own frames.

A `Calibration` holds the smoothing and the range of each activation and the digest of each weight.
Ranges are measured after smoothing, so the frames are read twice. The tower is the same for every
reducer and budget, so one calibration serves every graph of a bundle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import onnx_ir as ir
import typer
from numpy.typing import NDArray

from calibration.frames.dataset import Frames
from calibration.scales.calibration_file import (
    Calibration,
    FramesRecord,
    LayerRecord,
    SiteRecord,
    Smoothing,
)
from calibration.scales.layers import Site, array_of, find_sites
from calibration.scales.observers import Recorder
from calibration.scales.ranges import Method, find_threshold
from calibration.scales.resume import State, StateFile
from calibration.scales.smooth import Channels, try_smoothing
from engines.cli import ThreadsOption
from engines.errors import CalibrationError
from engines.progress_bar import Progress

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        method: how an activation's range is chosen; `calibration.scales.ranges` explains each.
        smooth: let SmoothQuant move outlying channels into the weights.
        alphas: what is tried for each activation; the best, or no smoothing, is taken.
        sample_rows: rows of each activation that alphas are judged on.
        threads: CPU threads; None takes one for each physical core.
    """

    method: Annotated[
        Method,
        typer.Option(help=f"How an activation's range is chosen: {', '.join(get_args(Method))}."),
    ] = "mse"
    smooth: bool = True
    alphas: tuple[float, ...] = ALPHAS
    sample_rows: int = 256
    threads: ThreadsOption = None


def calibrate(
    graph_file: Path,
    frames: Frames,
    options: CalibrationOptions = CalibrationOptions(),
    *,
    progress: Progress = lambda line, done: None,
    resume: Path | None = None,
) -> Calibration:
    """Find how to quantize a tower.

    Args:
        graph_file: a float32 vision graph; its reducer and projector are not run.
        frames: `pixel_values` of one picture each, float32[1, 3, H, W]. They are gone through once
            or twice and must come in the same order each time.
        options: how.
        progress: called for every frame.
        resume: a file that keeps what was gathered while it runs. If it is there, the calibration
            that was interrupted goes on, or was done and is made again from it; it stays, for the
            caller to remove.

    Raises:
        CalibrationError: the graph is not a float32 vision graph, a weight or an activation is not
            finite (the layer is named), a frame is misshapen, or ``resume`` is of another
            calibration.
    """
    model = ir.load(graph_file)
    sites = find_sites(model)
    _refuse_not_finite(sites, graph_file)
    digests = {layer.name: layer.digest() for site in sites for layer in site.layers}
    states = StateFile(resume, _identify(options, digests, len(frames)))
    recorder = Recorder(model, sites, frames, states, options.threads, progress)

    state = recorder.measure_channels(options.sample_rows)
    activations = {site.name: _reshape(site, state, options) for site in sites}
    state, thresholds = _find_thresholds(recorder, state, activations, options)
    return Calibration(
        method=options.method,
        frames=FramesRecord(count=state.seen, sha256=state.chain),
        sites={
            name: SiteRecord(
                threshold=thresholds[name],
                largest=found.largest,
                mean=found.channels.mean,
                smoothing=found.smoothing,
            )
            for name, found in activations.items()
        },
        layers={
            layer.name: LayerRecord(site=site.name, weight_sha256=digests[layer.name])
            for site in sites
            for layer in site.layers
        },
    )


def _identify(options: CalibrationOptions, digests: Mapping[str, str], frames: int) -> str:
    """Return a digest of what a calibration depends on, beside what is on its frames."""
    kept = {name: value for name, value in asdict(options).items() if name != "threads"}
    return hashlib.sha256(json.dumps([kept, digests, frames]).encode()).hexdigest()


@dataclass(frozen=True)
class _Activation:
    """An activation as it is quantized: with its smoothing, and its channels after that."""

    smoothing: Smoothing | None
    channels: Channels

    @property
    def largest(self) -> float:
        return float(self.channels.largest.max())

    def smooth(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.smoothing is None:
            return rows
        return (rows - self.smoothing.shift) / self.smoothing.scale


def _reshape(site: Site, state: State, options: CalibrationOptions) -> _Activation:
    lowest, highest, total, rows = (
        state.arrays[f"{what}/{site.name}"] for what in ("lowest", "highest", "sum", "rows")
    )
    channels = Channels(lowest, highest, (total / rows).astype(np.float32))
    chosen = _choose_smoothing(site, state, channels, options)
    if chosen is None:
        return _Activation(None, channels)
    return _Activation(chosen, channels.smoothed(chosen.shift, chosen.scale))


def _choose_smoothing(
    site: Site, state: State, channels: Channels, options: CalibrationOptions
) -> Smoothing | None:
    """Take the trial with the least error; one that adds nodes must halve the plain error."""
    if not options.smooth or site.source.is_graph_input():
        return None
    plain, *trials = try_smoothing(
        state.arrays[f"sample/{site.name}"],
        channels,
        [layer.matrix() for layer in site.layers],
        options.alphas,
        options.method,
    )
    best = min(trials, key=lambda trial: trial.error)
    if best.error >= plain.error * (1.0 if site.foldable else 0.5):
        return None
    return Smoothing(
        alpha=best.alpha,
        shift=best.shift,
        scale=best.scale,
        error=best.error,
        error_before=plain.error,
    )


def _find_thresholds(
    recorder: Recorder,
    state: State,
    activations: Mapping[str, _Activation],
    options: CalibrationOptions,
) -> tuple[State, dict[str, float]]:
    """Return each activation's magnitude that becomes 127; all but ``max`` see frames again."""
    largest = {name: found.largest for name, found in activations.items()}
    if options.method == "max":
        return state, largest
    state = recorder.measure_histograms(
        state, largest, lambda name, rows: activations[name].smooth(rows)
    )
    return state, {
        name: find_threshold(state.arrays[f"counts/{name}"], top, options.method)
        for name, top in largest.items()
    }


def _refuse_not_finite(sites: Sequence[Site], graph_file: Path) -> None:
    bad = [
        layer.name
        for site in sites
        for layer in site.layers
        if not np.isfinite(array_of(layer.weight)).all()
    ]
    if bad:
        others = f" and {len(bad) - 1} more layers" if len(bad) > 1 else ""
        raise CalibrationError(
            f"{graph_file}: the weight of {bad[0]}{others} holds values that are not finite. The "
            "checkpoint is damaged; download it again."
        )
