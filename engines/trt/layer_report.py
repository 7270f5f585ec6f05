"""What became of a graph: its layers as parsed, and as TensorRT fused them.

Enters: a parsed network, and, where a GPU can load the plan, the engine inspector's JSON. Leaves:
counts by kind and type, whether attention was fused, and the Q/DQ nodes that were not. The
inspector has no field for fusion, so it is told by the words TensorRT names its kernels with.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from pydantic import BaseModel, ConfigDict

_FUSED_ATTENTION = ("mha", "fmha", "flash_attention", "fused_attention")
_QUANTIZATION = ("quantize", "dequantize", "quantizelinear", "dequantizelinear")


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkReport(_Report):
    """The graph as NVIDIA's parser understood it, before any fusion."""

    layers: int
    kinds: dict[str, int]
    """TensorRT layer type -> count."""
    output_types: dict[str, int]
    """Type of the layers' outputs -> count."""


class EngineReport(_Report):
    """The engine as it was built."""

    layers: int
    kinds: dict[str, int]
    output_types: dict[str, int]
    fused_attentions: int
    """Layers that compute a whole attention."""
    softmax_layers: int
    """Softmax outside fused attention: attention that was not fused, and the reducer's own."""
    quantization_left: int
    """Q and DQ that no layer took in: each costs a pass over its tensor."""


class LayerReport(_Report):
    """What is saved as `<plan>.layers.json`."""

    parse_seconds: float
    network: NetworkReport
    engine: EngineReport | None
    """None without a GPU: only the device can open its plan."""


def report_network(network: Any) -> NetworkReport:
    """Count the layers of a parsed `INetworkDefinition`."""
    kinds: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kinds[layer.type.name] += 1
        for output in range(layer.num_outputs):
            tensor = layer.get_output(output)
            if tensor is not None:
                types[tensor.dtype.name] += 1
    return NetworkReport(
        layers=network.num_layers, kinds=_sorted(kinds), output_types=_sorted(types)
    )


def report_engine(inspector_json: str) -> EngineReport:
    """Count the layers of an engine from `EngineInspector.get_engine_information`."""
    layers = json.loads(inspector_json).get("Layers", [])
    kinds: Counter[str] = Counter()
    types: Counter[str] = Counter()
    fused = softmax = quantization = 0
    for layer in layers:
        # Without detailed verbosity a layer is only its name.
        entry: dict[str, Any] = {"Name": layer} if isinstance(layer, str) else layer
        kind = str(entry.get("LayerType", "unknown"))
        kinds[kind] += 1
        name = f"{entry.get('Name', '')} {entry.get('TacticName', '')}".lower()
        is_attention = any(word in name for word in _FUSED_ATTENTION)
        fused += is_attention
        origin = f"{name} {kind} {entry.get('Metadata', '')}".lower()
        softmax += "softmax" in origin and not is_attention
        quantization += kind.lower() in _QUANTIZATION
        for output in entry.get("Outputs", []):
            types[_type_of(output)] += 1
    return EngineReport(
        layers=len(layers),
        kinds=_sorted(kinds),
        output_types=_sorted(types),
        fused_attentions=fused,
        softmax_layers=softmax,
        quantization_left=quantization,
    )


def _type_of(tensor: dict[str, Any]) -> str:
    """Return the type in a tensor's description.

    TensorRT 10 says "Half" under "Format/Datatype", 11 under "DataType"; 8.6 said "Row major linear
    FP16 format", where only FP16 matters.
    """
    fields = {name.lower(): value for name, value in tensor.items()}
    text = str(fields.get("datatype") or fields.get("format/datatype") or "unknown")
    words = text.removesuffix(" format").split()
    return words[-1] if words else "unknown"


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(counts.most_common())
