"""Write a calibration into a graph as symmetric Q/DQ around the layers it names, INT8 or FP8.

Activations are scaled per tensor and weights per channel, zero points are 0, and biases stay in
floating point. TensorRT takes its precision from these nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from calibration.scales.attention import quantize_attentions
from calibration.scales.calibration_file import Calibration, SiteRecord
from calibration.scales.insert_qdq import quantize_site, smooth_site
from calibration.scales.layers import Site, find_sites
from calibration.scales.number_format import INT8, NumberFormat
from engines.errors import CalibrationError

CALIBRATION_KEY = "foveate.calibration"
"""Metadata of the model: digest of the calibration that was applied."""


def apply_calibration(model: ir.Model, calibration: Calibration, form: NumberFormat = INT8) -> int:
    """Quantize a graph as a calibration says, in place.

    Layers it excludes stay as they are. A norm whose layers are all excluded is not smoothed.

    Args:
        model: a float32 graph of the checkpoint the calibration was made on, such as
            `export.vision.to_onnx.trace_graph` gives; convert to float16 afterwards.
        calibration: from `calibrate` or `load_calibration`.
        form: what the layers become; its ``one_scale`` is for graphs that become float16.

    Returns:
        How many attentions were quantized.

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
            quantize_site(model.graph, layers, _reach(found, form), found.mean, form)
    model.metadata_props[CALIBRATION_KEY] = calibration.digest()
    return len(quantize_attentions(model, calibration, form)) if form.attention else 0


def _reach(record: SiteRecord, form: NumberFormat) -> float:
    """Return what becomes the largest number: FP8 keeps small values where nothing is clipped."""
    return record.largest if form.kind.is_floating_point() else record.threshold


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
