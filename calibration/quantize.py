"""INT8 from the user's own frames: what to scale by is found once and written into any graph.

Enters: a float32 vision graph and frames. Leaves: a `Calibration`; and, applied to a graph of the
same tower, symmetric Q/DQ around the layers it names: per-tensor activations, per-channel weights,
zero points 0, biases in floating point. TensorRT takes its precision from exactly these nodes.

One calibration serves every graph of a bundle, whatever its reducer and budget, since the tower is
the same. Thresholds come after smoothing, so frames are gone through twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.layers import Site, array_of, find_sites
from calibration.ranges import Method, find_threshold
from calibration.record import Calibration, FramesRecord, LayerRecord, SiteRecord, Smoothing
from calibration.resume import State, StateFile
from calibration.rewrite import quantize_site, smooth_site
from calibration.smooth import Channels, try_smoothing
from calibration.statistics import Frames, Recorder
from engines.errors import CalibrationError
from engines.progress_bar import Progress

CALIBRATION_KEY = "foveate.calibration"
"""Metadata of the model: digest of the calibration that was applied."""

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        method: how an activation's range is chosen; `calibration.ranges` explains each.
        percentile: for the method of that name.
        smooth: let SmoothQuant move outlying channels into the weights.
        alphas: what is tried for each activation; the best, or no smoothing, is taken.
        sample_rows: rows of each activation that alphas are judged on.
        threads: CPU threads; None takes one for each physical core.
    """

    method: Method = "mse"
    percentile: float = 99.99
    smooth: bool = True
    alphas: tuple[float, ...] = ALPHAS
    sample_rows: int = 256
    threads: int | None = None


def calibrate(
    graph_file: Path,
    frames: Frames,
    options: CalibrationOptions = CalibrationOptions(),
    *,
    progress: Progress = lambda line, done: None,
    resume: Path | None = None,
) -> Calibration:
    """Find out how a tower is to be quantized.

    Args:
        graph_file: a float32 vision graph; its reducer and projector are not run.
        frames: `pixel_values` of one picture each, float32[1, 3, H, W]. They are gone through once
            or twice and must come in the same order each time.
        options: how.
        progress: told of every frame.
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
    kept = {name: value for name, value in asdict(options).items() if name != "threads"}
    identity = hashlib.sha256(json.dumps([kept, digests, len(frames)]).encode()).hexdigest()
    states = StateFile(resume, identity)
    recorder = Recorder(model, sites, frames, states, options.threads, progress)

    state = recorder.measure_channels(options.sample_rows)
    channels = {site.name: _channels_of(state, site) for site in sites}
    smoothing = {
        site.name: _choose_smoothing(site, state, channels[site.name], options) for site in sites
    }
    smoothed = {
        name: found.smoothed(chosen.shift, chosen.scale) if (chosen := smoothing[name]) else found
        for name, found in channels.items()
    }
    largest = {name: float(found.largest.max()) for name, found in smoothed.items()}
    thresholds = largest
    if options.method != "max":
        state = recorder.measure_histograms(
            state, largest, lambda name, rows: _smooth(rows, smoothing[name])
        )
        thresholds = {
            name: find_threshold(
                state.arrays[f"counts/{name}"], top, options.method, options.percentile
            )
            for name, top in largest.items()
        }
    return Calibration(
        method=options.method,
        percentile=options.percentile,
        frames=FramesRecord(count=state.seen, sha256=state.chain),
        sites={
            name: SiteRecord(
                threshold=thresholds[name],
                largest=largest[name],
                mean=smoothed[name].mean,
                smoothing=smoothing[name],
            )
            for name in channels
        },
        layers={
            layer.name: LayerRecord(site=site.name, weight_sha256=digests[layer.name])
            for site in sites
            for layer in site.layers
        },
    )


def apply_calibration(model: ir.Model, calibration: Calibration) -> None:
    """Quantize a graph as a calibration says, in place.

    Layers it excludes stay as they are. A norm whose layers are all excluded is not smoothed.

    Args:
        model: a float32 graph of the checkpoint the calibration was made on, such as
            `export.to_onnx.trace_graph` gives; convert to float16 afterwards.
        calibration: from `calibrate` or `load_calibration`.

    Raises:
        CalibrationError: the graph is not float32, or the calibration is of other weights.
    """
    sites = find_sites(model)
    _refuse_other_weights(sites, calibration)
    kept = {
        site: [layer for layer in site.layers if layer.name not in calibration.excluded]
        for site in sites
    }
    for site, layers in kept.items():
        smoothing = calibration.sites[site.name].smoothing
        if layers and smoothing is not None:
            smooth_site(model.graph, site, smoothing.shift, smoothing.scale)
    for site, layers in kept.items():
        if layers:
            found = calibration.sites[site.name]
            quantize_site(model.graph, layers, found.threshold, found.mean)
    model.metadata_props[CALIBRATION_KEY] = calibration.digest()


def _channels_of(state: State, site: Site) -> Channels:
    lowest, highest, total, rows = (
        state.arrays[f"{what}/{site.name}"] for what in ("lowest", "highest", "sum", "rows")
    )
    return Channels(lowest, highest, (total / rows).astype(np.float32))


def _choose_smoothing(
    site: Site, state: State, channels: Channels, options: CalibrationOptions
) -> Smoothing | None:
    """Take what costs least; what takes nodes of its own must cost half of nothing."""
    if not options.smooth or site.source.is_graph_input():
        return None
    plain, *trials = try_smoothing(
        state.arrays[f"sample/{site.name}"],
        channels,
        [layer.matrix() for layer in site.layers],
        options.alphas,
        options.method,
        options.percentile,
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


def _smooth(rows: NDArray[np.float32], smoothing: Smoothing | None) -> NDArray[np.float32]:
    return rows if smoothing is None else (rows - smoothing.shift) / smoothing.scale


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


def _refuse_other_weights(sites: Sequence[Site], calibration: Calibration) -> None:
    layers = [layer for site in sites for layer in site.layers]
    known = {name: record.site for name, record in calibration.layers.items()}
    unknown = [
        layer.name for site in sites for layer in site.layers if known.get(layer.name) != site.name
    ]
    if unknown:
        raise CalibrationError(
            f"The graph has {len(unknown)} layers that were not calibrated, the first is "
            f"{unknown[0]}: the calibration is of another model, or of a graph that reads fewer "
            "layers of this one. Calibrate on this graph."
        )
    changed = [
        layer.name
        for layer in layers
        if layer.digest() != calibration.layers[layer.name].weight_sha256
    ]
    if changed:
        raise CalibrationError(
            f"The calibration was made on other weights: {len(changed)} of {len(layers)} layers "
            f"differ, the first is {changed[0]}. Calibrate again on this checkpoint."
        )
