"""Find how a tower is to be quantized, on the user's own frames.

A `Calibration` holds the smoothing and the range of each activation and the digest of each weight.
The frames are gone through once. The tower is the same for every reducer and budget, so one
calibration serves every graph of a bundle.
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

from calibration.frames.dataset import Frames
from calibration.scales.attention import AttentionRange, find_attentions
from calibration.scales.calibration_file import (
    AttentionRecord,
    Calibration,
    FramesRecord,
    LayerRecord,
    SiteRecord,
    Smoothing,
)
from calibration.scales.layers import Site, array_of, find_sites
from calibration.scales.observers import Recorder
from calibration.scales.ranges import Method
from calibration.scales.resume import State, StateFile
from calibration.scales.smooth import Channels, Sample, Trial, try_smoothing
from engines.cli import ThreadsOption
from engines.errors import CalibrationError
from engines.progress_bar import Progress
from graphs.weights_apart import weights_apart

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
_PASS_SHARE = 0.85
"""Of the time; the rest is the search for smoothing."""
_STATE = "with attentions"
"""What a kept state holds; one that holds less is refused."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        method: how an activation's range is chosen; `calibration.scales.ranges` explains each.
        smooth: let SmoothQuant move outlying channels into the weights.
        alphas: what is tried for each activation; the best, or no smoothing, is taken.
        sample_rows: rows of each activation that alphas and ranges are judged on.
        threads: CPU threads; None takes one for each physical core.
    """

    method: Annotated[
        Method,
        typer.Option(help=f"How an activation's range is chosen: {', '.join(get_args(Method))}."),
    ] = "mse"
    smooth: bool = True
    alphas: tuple[float, ...] = ALPHAS
    sample_rows: int = 512
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
        frames: `pixel_values` of one picture each, float32[1, 3, H, W]. They are gone through once;
            a calibration that is continued must get them in the same order.
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
    with weights_apart(graph_file) as file:
        model = ir.load(file)
        sites, attentions = find_sites(model), [one.name for one in find_attentions(model)]
        _refuse_not_finite(sites, graph_file)
        digests = {layer.name: layer.digest() for site in sites for layer in site.layers}
        states = StateFile(resume, _identify(options, digests, len(frames)))
        passing = _part(progress, 0.0, _PASS_SHARE)
        recorder = Recorder(file, frames, states, options.threads, passing)
        state = recorder.measure_channels(options.sample_rows)
        records = {}
        for at, site in enumerate(sites):
            done = _PASS_SHARE + (1 - _PASS_SHARE) * at / len(sites)
            progress(f"smoothing of {site.name}", done)
            records[site.name] = _reshape(site, state, options)
    return Calibration(
        method=options.method,
        frames=FramesRecord(count=state.seen, sha256=state.chain),
        sites=records,
        layers={
            layer.name: LayerRecord(site=site.name, weight_sha256=digests[layer.name])
            for site in sites
            for layer in site.layers
        },
        attentions={name: _describe_attention(name, state, sites, records) for name in attentions},
    )


def _describe_attention(
    name: str, state: State, sites: Sequence[Site], records: Mapping[str, SiteRecord]
) -> AttentionRecord:
    """Return the ranges of an attention, its values as they will be smoothed."""
    query, key, lowest, highest = (
        state.arrays[f"{what}/{name}"] for what in ("query", "key", "value_lowest", "value_highest")
    )
    reader = next(
        (site for site in sites if site.values is not None and site.name.startswith(f"{name}.")),
        None,
    )
    smoothing = records[reader.name].smoothing if reader is not None else None
    found = AttentionRange(float(query.item()), float(key.item()), lowest, highest)
    return found.record(smoothing)


def _identify(options: CalibrationOptions, digests: Mapping[str, str], frames: int) -> str:
    """Return a digest of what a calibration depends on, beside what is on its frames."""
    kept = {name: value for name, value in asdict(options).items() if name != "threads"}
    return hashlib.sha256(json.dumps([_STATE, kept, digests, frames]).encode()).hexdigest()


def _reshape(site: Site, state: State, options: CalibrationOptions) -> SiteRecord:
    lowest, highest, total, rows, sampled, weight = (
        state.arrays[f"{what}/{site.name}"]
        for what in ("lowest", "highest", "sum", "rows", "sample", "weight")
    )
    channels = Channels(lowest, highest, (total / rows).astype(np.float32))
    sample = Sample(sampled.reshape(-1, sampled.shape[-1]), weight.ravel())
    chosen = _choose_smoothing(site, sample, channels, options)
    if chosen is None:
        threshold = sample.find_threshold(channels, options.method, sample.rows)
        return SiteRecord(
            threshold=threshold, largest=float(channels.largest.max()), mean=channels.mean
        )
    best, error_before = chosen
    smoothed = channels.smoothed(best.shift, best.scale)
    return SiteRecord(
        threshold=best.threshold,
        largest=float(smoothed.largest.max()),
        mean=smoothed.mean,
        smoothing=Smoothing(
            alpha=best.alpha,
            shift=best.shift,
            scale=best.scale,
            error=best.error,
            error_before=error_before,
        ),
    )


def _choose_smoothing(
    site: Site, sample: Sample, channels: Channels, options: CalibrationOptions
) -> tuple[Trial, float] | None:
    """Return the trial with the least error, and the error without smoothing.

    One that adds nodes must halve the plain error; None where none is good enough.
    """
    if not options.smooth:
        return None
    matrices = [layer.matrix() for layer in site.layers]
    plain, *trials = try_smoothing(sample, channels, matrices, options.alphas, options.method)
    best = min(trials, key=lambda trial: trial.error)
    if best.error >= plain.error * (1.0 if site.foldable else 0.5):
        return None
    return best, plain.error


def _part(progress: Progress, begin: float, end: float) -> Progress:
    return lambda line, done: progress(line, begin + done * (end - begin))


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
