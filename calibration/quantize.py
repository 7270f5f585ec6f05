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

from calibration.layers import Layer, Site, array_of, find_sites
from calibration.modules import MODULE_KEY
from calibration.ranges import LEVELS, Method, find_threshold
from calibration.record import Calibration, FramesRecord, LayerRecord, Smoothing
from calibration.resume import State, StateFile
from calibration.smooth import add_weight, fold_smoothing, search_alpha
from calibration.statistics import Frames, Progress, Recorder
from engines.errors import CalibrationError

CALIBRATION_KEY = "foveate.calibration"
"""Metadata of the model: digest of the calibration that was applied."""

ALPHAS = tuple(round(0.05 * step, 2) for step in range(20))


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        method: how an activation's range is chosen; `calibration.ranges` explains each.
        percentile: for the method of that name.
        smooth: let SmoothQuant move outlying channels into the weights.
        alphas: what is tried for each norm; the best, or no smoothing, is taken.
        sample_rows: rows of each activation that alphas are judged on.
        threads: CPU threads; None takes one for each physical core.
    """

    method: Method = "mse"
    percentile: float = 99.99
    smooth: bool = True
    alphas: tuple[float, ...] = ALPHAS
    sample_rows: int = 512
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
            that was interrupted goes on; it is removed at the end.

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
    identity = hashlib.sha256(json.dumps([kept, digests]).encode()).hexdigest()
    states = StateFile(resume, identity)
    recorder = Recorder(model, sites, frames, states, options.threads, progress)

    state = recorder.measure_channels(options.sample_rows)
    smoothing = _choose_smoothing(sites, state, options) if options.smooth else {}
    scales = {name: chosen.scales for name, chosen in smoothing.items()}
    largest = {
        site.name: float((state.arrays[f"largest/{site.name}"] / scales.get(site.name, 1)).max())
        for site in sites
    }
    thresholds = largest
    if options.method != "max":
        state = recorder.measure_histograms(state, largest, scales)
        thresholds = {
            name: find_threshold(
                state.arrays[f"counts/{name}"], largest[name], options.method, options.percentile
            )
            for name in largest
        }
    states.clear()
    return Calibration(
        method=options.method,
        percentile=options.percentile,
        frames=FramesRecord(count=state.seen, sha256=state.chain),
        layers={
            layer.name: LayerRecord(
                threshold=thresholds[site.name],
                largest=largest[site.name],
                weight_sha256=digests[layer.name],
                site=site.name,
            )
            for site in sites
            for layer in site.layers
        },
        smoothing=smoothing,
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
    for site in sites:
        layers = [layer for layer in site.layers if layer.name not in calibration.excluded]
        if not layers:
            continue
        if site.name in calibration.smoothing:
            fold_smoothing(model.graph, site, calibration.smoothing[site.name].scales)
        _quantize_source(model.graph, layers, calibration.layers[layers[0].name].threshold)
        for layer in layers:
            _quantize_weight(model.graph, layer)
    model.metadata_props[CALIBRATION_KEY] = calibration.digest()


def _choose_smoothing(
    sites: Sequence[Site], state: State, options: CalibrationOptions
) -> dict[str, Smoothing]:
    chosen = {}
    for site in sites:
        if site.norm is None:
            continue
        trials = search_alpha(
            state.arrays[f"sample/{site.name}"],
            state.arrays[f"largest/{site.name}"],
            [layer.matrix() for layer in site.layers],
            options.alphas,
            options.method,
            options.percentile,
        )
        best = min(trials, key=lambda trial: trial.error)
        if best.alpha is not None:
            chosen[site.name] = Smoothing(
                alpha=best.alpha,
                scales=best.scales,
                error=best.error,
                error_before=trials[0].error,
            )
    return chosen


def _quantize_source(graph: ir.Graph, layers: Sequence[Layer], threshold: float) -> None:
    """Put one Q/DQ pair between an activation and the layers that read it."""
    first, source = layers[0], layers[0].source
    scale = add_weight(graph, _half_exact(np.float32(threshold / LEVELS)), f"{first.name}.scale")
    zero = add_weight(graph, np.int8(0), f"{first.name}.zero_point")
    quantize = _node("QuantizeLinear", [source, scale, zero], first, "input")
    dequantize = _node("DequantizeLinear", [quantize.outputs[0], scale, zero], first, "input")
    _describe(quantize.outputs[0], ir.DataType.INT8, source.shape)
    _describe(dequantize.outputs[0], ir.DataType.FLOAT, source.shape)
    graph.insert_before(first.node, [quantize, dequantize])
    for layer in layers:
        layer.node.replace_input_with(0, dequantize.outputs[0])


def _quantize_weight(graph: ir.Graph, layer: Layer) -> None:
    """Store a weight as INT8 with a scale for each channel it makes."""
    weight, axis = layer.weight, layer.output_axis
    array = array_of(weight)
    others = tuple(index for index in range(array.ndim) if index != axis)
    scales = _half_exact(np.abs(array).max(axis=others) / np.float32(LEVELS))  # [N]
    shape = [-1 if index == axis else 1 for index in range(array.ndim)]
    integers = np.clip(np.round(array / scales.reshape(shape)), -LEVELS, LEVELS).astype(np.int8)
    inputs = [
        add_weight(graph, integers, f"{layer.name}.weight.int8"),
        add_weight(graph, scales, f"{layer.name}.weight.scale"),
        add_weight(graph, np.zeros(len(scales), np.int8), f"{layer.name}.weight.zero_point"),
    ]
    dequantize = _node("DequantizeLinear", inputs, layer, "weight", axis=axis)
    _describe(dequantize.outputs[0], ir.DataType.FLOAT, weight.shape)
    graph.insert_before(layer.node, dequantize)
    layer.node.replace_input_with(1, dequantize.outputs[0])
    if weight.name and not weight.uses():
        del graph.initializers[weight.name]


def _half_exact(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round scales up to a float16, so that a graph in float16 has the same integers."""
    half = scale.astype(np.float16)
    half = np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half)
    return np.where(half > 0, half, np.float16(1)).astype(np.float32)


def _node(
    operator: str, inputs: Sequence[ir.Value], layer: Layer, what: str, axis: int | None = None
) -> ir.Node:
    attributes = {} if axis is None else {"axis": axis}
    node = ir.node(operator, inputs, attributes, name=f"{layer.name}/{operator}_{what}")
    node.metadata_props[MODULE_KEY] = layer.name
    return node


def _describe(value: ir.Value, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    producer = value.producer()
    value.name = f"{producer.name}:0" if producer is not None else None
    value.type, value.shape = ir.TensorType(dtype), shape


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
    unknown = [layer.name for layer in layers if layer.name not in calibration.layers]
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
